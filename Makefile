# make dev first: it makes .venv, installs both packages editable with the test tools, and the hooks.
SHELL := bash
.PHONY: dev fmt check test all

dev:
	. scripts/environment.sh && own_python test && "$$python" -m pre_commit install

fmt:
	. scripts/environment.sh && own_python test && "$$python" -m ruff check --fix . \
	    && "$$python" -m ruff format .

check:
	bash scripts/check.sh

test:
	bash scripts/test.sh

# With the slow tests; those that need a GPU: bash scripts/test.sh -m gpu
all:
	bash scripts/test.sh -m "not gpu and not weights"
