# Everything starts here; `make help` lists the targets. Set-up needs python >= 3.11, make and a package index.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help report test robust notebooks lab lint api lock clean

PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Named after the content of what it was made from: a changed lock or pyproject.toml installs again.
STAMP := $(VENV)/.installed-$(shell cat requirements.lock pyproject.toml | cksum | tr ' ' '-')

# uv takes a minute where pip takes five. It knows no pip.conf, so pip is there where it fails.
UV_INSTALL = $(BIN)/python -m pip install --require-hashes -r .ci/uv.txt \
	&& $(BIN)/uv pip install --no-progress --compile-bytecode --cache-dir build/uv-cache \
	--python $(BIN)/python --require-hashes -r requirements.lock && rm -rf build/uv-cache

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

# One thread per process: processes share the cores, and threads that spin while they wait for one another become many
# times slower as soon as anything else runs.
report test robust notebooks: export OMP_NUM_THREADS := 1

report: $(STAMP)  ## train and write the demo report: figures/demo/report.html
	@rm -rf build/report
	@AFDS_RUNS="$(CURDIR)/build/report/runs" AFDS_FRESH=1 $(BIN)/afds run --profile demo --fresh --require-training

test: $(STAMP)  ## unit tests, then every notebook against its stored outputs
	@rm -rf build/test
	AFDS_RUNS="$(CURDIR)/build/test/unit" $(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder tests
	AFDS_RUNS="$(CURDIR)/build/test/runs" AFDS_FIGURES="$(CURDIR)/build/test/figures" AFDS_FRESH=1 \
		$(BIN)/pytest -q --nbval --nbval-current-env notebooks
	@AFDS_RUNS="$(CURDIR)/build/test/runs" $(BIN)/afds runs list --require-training

robust: $(STAMP)  ## kill and fuzz at length (100 kills, 10,000 mutated inputs), and every variant of the slow tests
	AFDS_ROBUST=full $(BIN)/pytest -q -n auto tests/robustness
	AFDS_ROBUST=full $(BIN)/pytest -q -n auto -m exhaustive tests

notebooks: $(STAMP)  ## execute the notebooks in place (demo, from an empty store) and keep their outputs
	@$(if $(ONLY),,rm -rf build/notebooks)
	@AFDS_RUNS="$(CURDIR)/build/notebooks/runs" AFDS_FIGURES="$(CURDIR)/build/notebooks/figures" AFDS_FRESH=1 \
		$(BIN)/python .ci/notebooks.py $(ONLY)

lab: $(STAMP)  ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab notebooks

lint: $(STAMP)  ## ruff (also notebooks), the floors of the packages, and mypy
	@$(BIN)/ruff check .
	@$(BIN)/lint-imports --no-cache --no-logo
	@$(BIN)/mypy

api: $(STAMP)  ## write docs/api.md from the docstrings
	@$(BIN)/python .ci/api.py

lock:  ## resolve requirements.lock and environment.yml anew from pyproject.toml
	@rm -rf build/uv
	@$(PYTHON) -m venv build/uv
	@build/uv/bin/python -m pip install -q --disable-pip-version-check uv packaging
	@build/uv/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate --all-extras \
		pyproject.toml -o requirements.lock
	@echo "uv==$$(build/uv/bin/uv --version | cut -d' ' -f2)" \
		| build/uv/bin/uv pip compile -q --universal --generate-hashes --no-annotate - -o .ci/uv.txt
	@build/uv/bin/python .ci/environment.py > build/environment.yml
	@mv build/environment.yml environment.yml
	@rm -rf build/uv

clean:  ## delete what can be made again, but neither .venv nor runs/ nor data/
	@rm -rf build figures/demo *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -path ./$(VENV) -prune -o -type d \( -name __pycache__ -o -name .ipynb_checkpoints \) -print0 | xargs -0 rm -rf

$(STAMP):
	@test -n "$(PYTHON)" || { echo "no python >= 3.11 found: install one, or name it: make PYTHON=/path/to/python" >&2; exit 2; }
	@mkdir -p build
	@echo "installing into $(VENV) once (a minute or some, and 6 GB; log: build/install.log)"
	@{ $(PYTHON) -m venv $(VENV) && export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off \
		&& { $(UV_INSTALL) || $(BIN)/python -m pip install --require-hashes -r requirements.lock ; } \
		&& $(BIN)/python -m pip install --no-deps --no-build-isolation -e . ; } > build/install.log 2>&1 \
		|| { tail -n 25 build/install.log >&2; echo "the installation failed; the whole log: build/install.log" >&2; exit 2; }
	@rm -f $(VENV)/.installed-*
	@touch $@
