#!/usr/bin/env bash
# Time the published shapes on a GPU: the fast chain against the plain one and the released code's style.
#
#   OUT=runs/bench-gpu bash scripts/bench_gpu.sh
#
# OUT         the folder for bench.json, bench.md, bench.png and trace_summary.json
# SECONDS_MAX stop after so many seconds (480); what was measured by then stays
#
# Shapes a (CIFAR-10) and b (CelebA-HQ-256) in full, random weights, every path at the same batch
# size. It needs one GPU and nothing else; 80 GB for the default batch sizes. Arguments go to
# `python -m ebm_prior bench`, for example --batch_size 4 for a smaller GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
need OUT "the folder to write to"
given_python

timeout "${SECONDS_MAX:-480}" "$python" -m ebm_prior bench --device cuda --shapes a b --trace \
    --out "$OUT" "$@"
