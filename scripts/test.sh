#!/usr/bin/env bash
# Run the whole suite on a machine with nothing but bash and Python 3.10 or newer: makes .venv on
# first use (see environment.sh), then lint, format, types and tests.
#
#   bash scripts/test.sh                   everything but the tests marked slow, gpu, weights
#   bash scripts/test.sh -k golden         arguments go to pytest
#   bash scripts/test.sh -n 0              in one process; by default one per core, eight at most
#   GOLDENS=dir1:dir2 bash scripts/test.sh     further golden folders
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
own_python test

bash "$root/scripts/check.sh"
cd "$root"
several=()
if "$python" -c 'import xdist' 2>/dev/null; then  # an environment of your own may lack it
    # A worker runs neighbours, which share fixtures, and helps the others when it is done.
    several=(-n auto --maxprocesses 8 --dist worksteal)
fi
exec "$python" -m pytest ${several[@]+"${several[@]}"} "$@"
