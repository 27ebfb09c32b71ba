#!/usr/bin/env bash
# Train an NVAE on CIFAR-10 with the flags that NVAE was published with.
#
#   DATA=data/cifar10 OUT=runs bash scripts/train_nvae_cifar10.sh
#
# DATA  the folder of CIFAR-10's python batches
# OUT   folder of the runs; writes OUT/eval-cifar10: checkpoint.pt, logs, and last.pt, from which a
#       run that was stopped goes on
#
# Published on 8 GPUs, 32 images each. With fewer, N in all, --micro_batch 32 with
# --batch_size 256/N keeps the 256 images of a step (BatchNorm sees 32 x N).
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the CIFAR-10 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save cifar10 --resume auto \
    --dataset cifar10 --num_channels_enc 128 --num_channels_dec 128 --epochs 400 \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 1 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --num_groups_per_scale 30 \
    --batch_size 32 --weight_decay_norm 1e-2 --num_nf 1 --use_se --res_dist --fast_adamax "$@"
