#!/usr/bin/env bash
# Train an NVAE on CelebA 64 with the flags that NVAE was published with.
#
#   DATA=data/celeba64 OUT=runs bash scripts/train_nvae_celeba64.sh
#
# DATA  the folder of train.lmdb and validation.lmdb
# OUT   folder of the runs; writes OUT/eval-celeba64: checkpoint.pt, logs, and last.pt, from which a
#       run that was stopped goes on
#
# Published on 8 GPUs, 16 images each. With fewer, N in all, --micro_batch 16 with
# --batch_size 128/N keeps the 128 images of a step (BatchNorm sees 16 x N).
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CelebA 64 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save celeba64 --resume auto \
    --dataset celeba_64 --num_channels_enc 64 --num_channels_dec 64 --epochs 90 \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 3 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --weight_decay_norm 1e-1 \
    --num_groups_per_scale 20 --batch_size 16 --num_nf 1 --ada_groups --use_se --res_dist \
    --fast_adamax "$@"
