# narrows: two commands for a fresh clone.
#   make run    set up, then the main job: what limits the reference model here, and the proof
#   make test   set up, then all tests
# Others: bench (side-by-side figures), docs, lint, clean.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Data for checks against measured profiles, where it lies beside the repository; else skipped aloud.
export NARROWS_DATA ?= $(realpath ../shared/data)
# Waiting threads sleep: spinning costs a hundredfold on shared cores.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: run test bench docs lint clean setup

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing narrows and what it needs into $(VENV) (about two minutes, once) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

run: $(READY)
	@$(BIN)/narrows relieve --report report.html

test: $(READY)
	@$(BIN)/python -m pytest

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright

bench: $(READY)
	@for b in pricing shell kv accuracy; do $(BIN)/python -m benchmarks.$$b || exit 1; done

docs: $(READY)
	@$(BIN)/python scripts/docs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis report.html
