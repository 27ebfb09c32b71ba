#!/usr/bin/env bash
# Train an NVAE on MNIST with the flags that NVAE was published with.
#
#   DATA=data/mnist OUT=runs bash scripts/train_nvae_mnist.sh
#
# DATA  the folder of the four idx files
# OUT   folder of the runs; writes OUT/eval-mnist: checkpoint.pt, logs, and last.pt, from which a
#       run that was stopped goes on
#
# Published on 2 GPUs, 200 images each. With fewer, N in all, --micro_batch 200 with
# --batch_size 400/N keeps the 400 images of a step (BatchNorm sees 200 x N).
#
# One process per GPU, one on the CPU without a GPU; NPROC, NNODES and the variables of the
# rendezvous are in environment.sh. Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need DATA "the path of the MNIST folder" OUT "the folder to write the run to"
given_python

launch nvae.train --data "$DATA" --root "$OUT" --save mnist --resume auto \
    --dataset mnist --batch_size 200 --epochs 400 --num_latent_scales 2 \
    --num_groups_per_scale 10 --num_postprocess_cells 3 --num_preprocess_cells 3 \
    --num_cell_per_cond_enc 2 --num_cell_per_cond_dec 2 --num_latent_per_group 20 \
    --num_preprocess_blocks 2 --num_postprocess_blocks 2 --weight_decay_norm 1e-2 \
    --num_channels_enc 32 --num_channels_dec 32 --num_nf 0 --ada_groups --use_se --res_dist \
    --fast_adamax "$@"
