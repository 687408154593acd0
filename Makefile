# `make demo` and `make test` install everything they need first; `make help` lists all targets.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTHON ?= $(shell command -v python3.11 || command -v python3)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-slow test-slurm lint format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(READY) dot ## discover, evaluate and draw a circuit of the embedded model
	$(BIN)/edgeprune prune experiment=ioi task.test=300 run_dir=runs/demo overwrite=true
	$(BIN)/edgeprune evaluate runs/demo head_permuted=1
	$(BIN)/edgeprune draw runs/demo
	@echo "look into the circuit: runs/demo/page.html; its picture: runs/demo/circuit.pdf (.png, .svg)"

test: $(READY) dot ## run the tests (some ten minutes on two cores)
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(READY) dot ## run the slow tests too
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not slurm"

test-slurm: $(READY) ## run the tests on a SLURM cluster (SLURM_CONF, or the machine's own)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[test,slurm]'
	$(BIN)/python -m pytest -m slurm tests/test_slurm.py

lint: $(READY) ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment and build outputs, but no runs
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache

# The stamp is written last, so an incomplete environment is built again.
$(READY): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; found $$("$(PYTHON)" --version 2>&1). Set PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (a few minutes the first time)"
	@"$(PYTHON)" -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory debian-package \
	  PACKAGE=python3-venv WHY="Python's venv module is missing"
	"$(PYTHON)" -m venv --clear $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/pip install --quiet --editable '.[test]'
	@touch $(READY)

.PHONY: browser
browser: ## install Chromium, for the tests of the page
	@command -v chromium >/dev/null || $(MAKE) --no-print-directory debian-package \
	  PACKAGE=chromium WHY="a browser for the tests of the page is missing" || \
	  echo "going on without: the tests of the page are skipped"

.PHONY: dot debian-package
dot:
	@command -v dot >/dev/null || $(MAKE) --no-print-directory debian-package \
	  PACKAGE=graphviz WHY="the program dot, which renders drawings, is missing" || \
	  echo "going on without: circuits can be drawn as .dot files only"

debian-package:
	@if ! command -v apt-get >/dev/null; then echo "$(WHY); please install $(PACKAGE)"; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; \
	else echo "$(WHY); install it with: sudo apt-get install $(PACKAGE)"; exit 1; fi; \
	echo "$(WHY); installing Debian's $(PACKAGE)"; \
	export DEBIAN_FRONTEND=noninteractive; \
	$$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends $(PACKAGE) >/dev/null
