# Two commands do everything on a fresh machine: make demo, make test. `make help` lists the rest.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-batch test bench ui screenshots lint help clean
.DEFAULT_GOAL := help

demo: $(READY)  ## Run the main job on the local cloud: preempted again and again, finished all the same
	@$(BIN)/python -m flows demo

demo-batch: $(READY)  ## Run a real embedding model over documents on a fleet whose machines are taken away
	@$(BIN)/python -m flows demo-batch

test: $(READY)  ## Run the tests
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/lint-imports
	@$(BIN)/python -m pytest -q -n 2 --dist loadgroup $(PYTEST_ARGUMENTS)

bench: $(READY)  ## Run every benchmark; each writes benchmarks/results/NAME.json
	@for file in benchmarks/[a-z]*.py; do name=$$(basename $$file .py); $(BIN)/python -m benchmarks.$$name || exit 1; done

ui: $(READY)  ## Serve the Prefect UI with the last runs in it, on http://127.0.0.1:4200
	@$(BIN)/python -m flows ui

screenshots: $(READY)  ## Make the pictures in docs/ anew (needs chromium)
	@$(BIN)/python docs/make_screenshots.py

help:  ## List these
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort | expand -t 14

clean:  ## Remove the virtual environment and everything that runs left here
	rm -rf $(VENV) .holdfast

# The stamp carries what was installed: a changed dependency file installs again, nothing else does. The .pth file lets
# Prefect's own commands import flows, tasks and blocks, which are no part of the package (`prefect block register`).
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Holdfast needs Python 3.11 or later; name one: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): the first time takes a few minutes"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "holdfast-checkout.pth").write_text(str(pathlib.Path().absolute()))'
	@touch $(READY)
