#!/usr/bin/env bash
# Train an NVAE on ImageNet 32 with the flags that NVAE was published with.
#
#   DATA=data/imagenet_32 OUT=runs bash scripts/train_nvae_imagenet32.sh
#
# DATA  the folder of train.lmdb and validation.lmdb
# OUT   folder of the runs; writes OUT/eval-imagenet32: checkpoint.pt, logs, and last.pt, from which a
#       run that was stopped goes on
#
# Published on 3 machines with 8 GPUs each, 24 images each. With fewer, N in all, --micro_batch 24 with
# --batch_size 576/N keeps the 576 images of a step (BatchNorm sees 24 x N).
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the ImageNet 32 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save imagenet32 --resume auto \
    --dataset imagenet_32 --num_channels_enc 192 --num_channels_dec 192 --epochs 45 \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 1 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --num_groups_per_scale 28 \
    --batch_size 24 --num_nf 1 --warmup_epochs 1 --weight_decay_norm 1e-2 \
    --weight_decay_norm_anneal --weight_decay_norm_init 1e0 --use_se --res_dist \
    --fast_adamax "$@"
