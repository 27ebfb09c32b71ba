#!/usr/bin/env bash
# Train a small HVAE (3 latent layers, 2 M parameters) on CIFAR-10: tens of minutes on a CPU.
#
#   DATA=data/cifar10 OUT=runs/hvae_small bash scripts/train_hvae_cifar10_small.sh
#   DATA=data/cifar10 OUT=runs/hvae_small bash scripts/train_hvae_cifar10_small.sh --max_minutes 20
#
# DATA  the folder of CIFAR-10's python batches
# OUT   the run: hvae.safetensors (the VAE), last.pt, report.json, logs and image grids; a run that
#       was stopped goes on from its last.pt: start the second command again for 20 minutes more
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m ebm_prior train_hvae`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CIFAR-10 folder" OUT "the folder to write the run to"
given_python

launch ebm_prior train_hvae --dataset cifar10 --size small --data "$DATA" --out "$OUT" \
    --resume auto "$@"
