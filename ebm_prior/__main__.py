"""`python -m ebm_prior <command>`, or `ebm-prior <command>`."""

from __future__ import annotations

import sys

from ebm_prior.commands import main

if __name__ == "__main__":
    sys.exit(main())
