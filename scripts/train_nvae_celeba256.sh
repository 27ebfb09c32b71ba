#!/usr/bin/env bash
# Train an NVAE on CelebA-HQ 256 with the flags that NVAE was published with.
#
#   DATA=data/celeba256 OUT=runs bash scripts/train_nvae_celeba256.sh
#
# DATA  the folder of train.lmdb and validation.lmdb
# OUT   folder of the runs; writes OUT/eval-celeba256: checkpoint.pt, logs, and last.pt, from which a
#       run that was stopped goes on
#
# Published on 3 machines with 8 GPUs each, 4 images each. With fewer, N in all, --micro_batch 4 with
# --batch_size 96/N keeps the 96 images of a step (BatchNorm sees 4 x N).
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CelebA-HQ 256 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save celeba256 --resume auto \
    --dataset celeba_256 --num_channels_enc 30 --num_channels_dec 30 --epochs 300 \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 5 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --weight_decay_norm 1e-2 \
    --num_groups_per_scale 16 --batch_size 4 --num_nf 2 --ada_groups \
    --min_groups_per_scale 4 --weight_decay_norm_anneal --weight_decay_norm_init 1. \
    --use_se --res_dist --fast_adamax --num_x_bits 5 "$@"
