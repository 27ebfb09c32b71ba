#!/usr/bin/env bash
# Every experiment of the paper on the shipped digits backbone: what README's section "The paper,
# command by command" reports of the digits. Needs .venv like demo.sh, and one to two hours on two
# cores; started again, it goes on.
#
#   bash scripts/paper_digits.sh           writes runs/paper/<experiment>-<seed>/report.json and *.png
#   SEEDS="0" bash scripts/paper_digits.sh       one seed in a third of the time
#
# CHECKPOINT  another NVAE of the digits (default: the shipped one)
# OUT         the folder to write to (default: runs/paper)
# SEEDS       of training and of what is drawn (default: 0 1 2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
own_python demo

cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
checkpoint="${CHECKPOINT:-ebm_prior/assets/digits-nvae.pt}" out="${OUT:-runs/paper}"

# run COMMAND NAME ARGUMENTS: into OUT/NAME, unless its report is there.
run() {
    local command="$1" name="$2"
    shift 2
    if [ -e "$out/$name/report.json" ]; then
        return
    fi
    echo "== $command $name" >&2
    "$python" -m ebm_prior "$command" --checkpoint "$checkpoint" --out "$out/$name" "$@"
}

# train NAME ARGUMENTS: a prior into OUT/NAME.
train() {
    local name="$1"
    shift
    run train "$name" --preset digits --resume auto "$@"
}

for seed in ${SEEDS:-0 1 2}; do
    for kind in diffusion joint ncp fitted; do
        train "$kind-$seed" --prior "$kind" --seed "$seed"
    done
    train "classes-$seed" --seed "$seed" --attribute class:0,1 --label_steps 3
    train "attributes-$seed" --seed "$seed" --attribute parity:0 --attribute loop:1 --label_steps 3

    prior="$out/diffusion-$seed/prior.safetensors"
    run evaluate "table1-$seed" --seed "$seed" --batch_size 500 --resume auto \
        --prior "$out"/{diffusion,joint,ncp}-"$seed"/prior.safetensors
    run hierarchy "figure2-$seed" --seed "$seed" --prior "$prior" --num_references 1000 --num_variants 4 --batch_size 500
    run ood "figure3-$seed" --seed "$seed" --prior "$prior"
    run control "figure4-$seed" --seed "$seed" --prior "$out/attributes-$seed/prior.safetensors" \
        --compose parity=odd loop=loop
    run control "figure5-$seed" --seed "$seed" --prior "$out/classes-$seed/prior.safetensors"
    run transitions "figure6-$seed" --seed "$seed" --prior "$prior"
    run doctor "chains-$seed" --prior "$prior"
done
run ablate table3 --preset digits --cells 3x4 3x8 3x16 2x8 6x8 --resume auto
run doctor hole --hole
