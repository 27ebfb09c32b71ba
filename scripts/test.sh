#!/usr/bin/env bash
# Run the whole suite on a machine with nothing but bash and Python 3.10 or newer: makes .venv on
# first use (see environment.sh), then lint, format, types and tests.
#
#   bash scripts/test.sh                   everything but the tests marked slow, gpu, weights
#   bash scripts/test.sh -k golden         arguments go to pytest
#   GOLDENS=dir1:dir2 bash scripts/test.sh     further golden folders
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
own_python test

bash "$root/scripts/check.sh"
cd "$root"
exec "$python" -m pytest "$@"
