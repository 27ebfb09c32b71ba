#!/usr/bin/env bash
# The main job on the shipped digits backbone, on a machine with nothing but bash and Python 3.10 or
# newer: makes .venv on first use (see environment.sh), trains a prior, samples, measures.
#
#   bash scripts/demo.sh                   writes runs/demo/report.json and gaussian_vs_ebm.png
#
# Runs in the folder of the repository. Arguments go to `python -m ebm_prior demo`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
own_python demo

cd "$root"
exec "$python" -m ebm_prior demo "$@"
