#!/usr/bin/env bash
# Train an NVAE on LSUN church 64 with the flags published with VAEBM: Gaussian decoder.
#
#   DATA=data/church64 OUT=runs bash scripts/train_nvae_church64.sh
#
# DATA  the folder of church_outdoor_train_lmdb and church_outdoor_val_lmdb
# OUT   folder of the runs; writes OUT/eval-church64: checkpoint.pt, logs, and last.pt, from which a
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
need DATA "the path of the LSUN church 64 folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save church64 --resume auto \
    --dataset lsun_church_64 --num_channels_enc 48 --num_channels_dec 48 --epochs 60 \
    --num_postprocess_cells 2 --num_preprocess_cells 2 --num_latent_scales 3 \
    --num_latent_per_group 20 --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 \
    --num_preprocess_blocks 1 --num_postprocess_blocks 1 --weight_decay_norm 1e-1 \
    --num_groups_per_scale 5 --batch_size 32 --num_nf 1 --num_mixture_dec 1 --fast_adamax \
    --warmup_epochs 1 --arch_instance res_mbconv --use_se --res_dist "$@"
