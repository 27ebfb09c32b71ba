#!/usr/bin/env bash
# Draw images from a trained EBM prior.
#
#   CHECKPOINT=nvae/checkpoint.pt PRIOR=runs/celeba256/prior.safetensors OUT=runs/samples \
#       bash scripts/sample.sh --num_samples 64
#
# CHECKPOINT  the NVAE checkpoint the prior was trained on
# PRIOR       prior.safetensors of a training run
# OUT         the folder to write images to
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m ebm_prior sample`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need CHECKPOINT "the path of an NVAE checkpoint" PRIOR "the path of a prior.safetensors" \
    OUT "the folder to write images to"
given_python

launch ebm_prior sample --checkpoint "$CHECKPOINT" --prior "$PRIOR" --out "$OUT" "$@"
