#!/usr/bin/env bash
# Train the demo's backbone: a small NVAE on scikit-learn's digits, minutes on one core.
#
#   KL_WEIGHT=0.5 OUT=runs/nvae bash scripts/train_nvae_digits.sh
#
# KL_WEIGHT  weight of the KL term; 1 is the evidence lower bound
# OUT        folder of the runs; writes OUT/eval-digits-klKL_WEIGHT/checkpoint.pt
#
# The checkpoints in ebm_prior/assets are what it writes with KL_WEIGHT=0.5 (digits-nvae.pt) and
# KL_WEIGHT=1 (digits-nvae-kl1.pt). Arguments go to `python -m nvae.train`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need KL_WEIGHT "the weight of the KL term, 0.5 for the demo's backbone" \
    OUT "the folder to write the run to"
own_python demo

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" -m nvae.train --root "$OUT" --save "digits-kl$KL_WEIGHT" --dataset digits \
    --arch_instance res_bnswish --res_dist \
    --num_latent_scales 2 --num_groups_per_scale 1 --num_latent_per_group 4 \
    --num_channels_enc 12 --num_channels_dec 12 \
    --num_preprocess_blocks 1 --num_preprocess_cells 2 \
    --num_postprocess_blocks 1 --num_postprocess_cells 2 --num_mixture_dec 1 \
    --batch_size 100 --learning_rate 4e-3 --epochs 100 --seed 1 \
    --kl_weight "$KL_WEIGHT" --device cpu "$@"
