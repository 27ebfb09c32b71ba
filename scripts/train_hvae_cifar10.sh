#!/usr/bin/env bash
# Train the full-size HVAE (3 latent layers, 9 M parameters) on CIFAR-10, the paper's second
# backbone; about 1 hour is expected on a modern GPU.
#
#   DATA=data/cifar10 OUT=runs/hvae bash scripts/train_hvae_cifar10.sh
#
# DATA  the folder of CIFAR-10's python batches
# OUT   the run: hvae.safetensors (the VAE), last.pt, report.json, logs and image grids; a run that
#       was stopped goes on from its last.pt
#
# The 128 images of a step are per process: with N GPUs add --batch_size 128/N.
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m ebm_prior train_hvae`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CIFAR-10 folder" OUT "the folder to write the run to"
given_python

launch ebm_prior train_hvae --dataset cifar10 --size full --data "$DATA" --out "$OUT" \
    --resume auto "$@"
