#!/usr/bin/env bash
# Train the EBM prior on an NVAE trained on CelebA-HQ-256 (preset celeba256).
#
#   CHECKPOINT=nvae/checkpoint.pt DATA=data/celeba-lmdb OUT=runs/celeba256 bash scripts/train_ebm_celeba256.sh
#
# CHECKPOINT  an NVAE checkpoint in upstream's format
# DATA        CelebA-HQ in NVAE's LMDB layout (the folder with train.lmdb and validation.lmdb)
# OUT         the run: last.pt, prior.safetensors, config.json, logs and image grids; a run that
#             was stopped goes on from its last.pt
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m ebm_prior train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need CHECKPOINT "the path of an NVAE checkpoint" DATA "the path of the CelebA-HQ LMDB folder" \
    OUT "the folder to write the run to"
given_python

launch ebm_prior train --preset celeba256 --checkpoint "$CHECKPOINT" --data "$DATA" --out "$OUT" \
    --resume auto "$@"
