#!/usr/bin/env bash
# Lint, format and types of the whole tree, with the versions pinned in setup.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
help_wanted "$@"
own_python test

cd "$root"
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
