#!/usr/bin/env bash
# Train the EBM prior on the small HVAE of CIFAR-10 (preset hvae_small); an hour or so on a CPU.
#
#   CHECKPOINT=runs/hvae_small/hvae.safetensors DATA=data/cifar10 OUT=runs/hvae_small_prior \
#       bash scripts/train_ebm_hvae_small.sh
#
# CHECKPOINT  the hvae.safetensors that scripts/train_hvae_cifar10_small.sh wrote
# DATA        the folder of CIFAR-10's python batches
# OUT         the run: last.pt, prior.safetensors, config.json, logs and image grids; a run that
#             was stopped goes on from its last.pt
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m ebm_prior train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need CHECKPOINT "the path of an hvae.safetensors" DATA "the path of the CIFAR-10 folder" \
    OUT "the folder to write the run to"
given_python

launch ebm_prior train --preset hvae_small --checkpoint "$CHECKPOINT" --data "$DATA" --out "$OUT" \
    --resume auto "$@"
