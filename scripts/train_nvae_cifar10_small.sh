#!/usr/bin/env bash
# Train a small NVAE on CIFAR-10 in bf16: one GPU, tens of minutes; nobody published it.
#
#   DATA=data/cifar10 OUT=runs bash scripts/train_nvae_cifar10_small.sh
#   DATA=data/cifar10 OUT=runs timeout -s TERM 20m bash scripts/train_nvae_cifar10_small.sh
#
# DATA    the folder of CIFAR-10's python batches
# OUT     folder of the runs; writes OUT/eval-cifar10_small: checkpoint.pt, logs (with images per
#         second and bits per dimension), and last.pt, from which a run that was stopped goes on.
#         After the second command above, start it again for the next 20 minutes
# EPOCHS  length of the schedules, 30 by default; must stay the same from start to start
#
# NPROC, NNODES and the variables of the rendezvous are in environment.sh. Arguments go to
# `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CIFAR-10 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save cifar10_small --resume auto \
    --dataset cifar10 --num_channels_enc 48 --num_channels_dec 48 --epochs "${EPOCHS:-30}" \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 1 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 1 --num_cell_per_cond_dec 1 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --num_groups_per_scale 10 \
    --batch_size 128 --warmup_epochs 1 --weight_decay_norm 1e-2 --weight_decay_norm_anneal \
    --weight_decay_norm_init 1 --num_nf 1 --use_se --res_dist --fast_adamax --amp bf16 \
    --iw_samples 1 --final_iw_samples 20 --save_every 500 "$@"
