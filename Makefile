# Two commands on a fresh machine: `make demo` and `make test`. Each target first sets up .venv by itself.
# Needed before: Python 3.11 or newer, make and, on Debian or Ubuntu, apt-get.
#
#   make demo DEMO_FLAGS="--devices 5"    the whole cycle on this machine, with real processes
#   make test TEST_FLAGS="-k tls"         all tests except the slow ones, in several processes (-n 0: in one)
#   make soak                             the slow ones, with TensorFlow for examples/keras-app
#   make docs                             the documentation, into site/; warnings are errors
#   make check                            lint, format, types, import contracts: as in CI
#   make bench BENCH_FLAGS=--quick        the numbers of docs/numbers.md, with the other systems
#   make lock                             update all versions in requirements.lock
#
#   PYTHON=python3.12     the interpreter to build .venv with
#   PIP_FLAGS="..."       passed to `pip install`, e.g. an index with smaller builds of torch

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
# requirements.lock holds every version, also of the build tool, so that pip resolves nothing on your machine.
INSTALL = $(BIN)/pip install $(PIP_FLAGS) --constraint requirements.lock --no-build-isolation --editable

.DEFAULT_GOAL := help
.PHONY: help demo test check soak bench lock docs

help:
	@sed -n 's/^#   make/make/p' Makefile

demo: $(VENV)/demo.stamp
	$(BIN)/edgefl demo $(DEMO_FLAGS)

test: $(VENV)/dev.stamp
	sh deploy/system-packages.sh
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal $(TEST_FLAGS)

soak: $(VENV)/soak.stamp
	sh deploy/system-packages.sh
	$(BIN)/python -m pytest -m soak --timeout 3600 --numprocesses logical --maxprocesses 2 --dist worksteal $(TEST_FLAGS)

docs: $(VENV)/docs.stamp
	$(BIN)/python -m mkdocs build --strict

check: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/bench.stamp $(VENV)/mlserver.stamp
	$(BIN)/python -m benchmarks.rounds $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.serving $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.simulation $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.tiers $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.goodput $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.sites $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.offload $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.stages $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.lora $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.generation $(BENCH_FLAGS)

# One solution for Python 3.11 to 3.13 and all extras. The extras' ranges allow every version that works.
lock: $(VENV)/dev.stamp
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --all-extras --no-annotate \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --upgrade --python-version 3.11 --no-annotate \
	  --custom-compile-command "make lock" --output-file benchmarks/mlserver.lock benchmarks/mlserver.in

# A stamp file shows that .venv has the packages of pyproject.toml; a second `make test` installs nothing.
$(VENV)/demo.stamp: $(VENV)/tools.stamp
	$(INSTALL) '.[agent,train,cloud,examples]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/tools.stamp
	$(INSTALL) '.[dev]'
	$(BIN)/pip check
	touch $@ $(VENV)/demo.stamp

$(VENV)/docs.stamp: $(VENV)/tools.stamp
	$(INSTALL) '.[docs]'
	touch $@

$(VENV)/soak.stamp: $(VENV)/tools.stamp
	$(INSTALL) '.[dev,docs,keras]'
	$(BIN)/pip check
	touch $@ $(VENV)/dev.stamp $(VENV)/demo.stamp $(VENV)/docs.stamp

$(VENV)/bench.stamp: $(VENV)/tools.stamp
	$(INSTALL) '.[bench]'
	$(BIN)/pip check
	touch $@ $(VENV)/dev.stamp $(VENV)/demo.stamp

# benchmarks.serving compares with MLServer, which pins older versions of what edgefl uses: an environment of its own.
$(VENV)/mlserver.stamp: benchmarks/mlserver.lock $(VENV)/tools.stamp
	$(PYTHON) -m venv $(VENV)/mlserver
	$(VENV)/mlserver/bin/pip install $(PIP_FLAGS) --requirement benchmarks/mlserver.lock || \
	  echo "MLServer does not install here (it needs Python 3.12 or older); its rows will be skipped"
	touch $@

$(VENV)/tools.stamp: pyproject.toml requirements.lock | $(BIN)/python
	$(BIN)/pip install $(PIP_FLAGS) --constraint requirements.lock setuptools
	touch $@

# In Debian, venv is a separate package.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "edgefl needs Python 3.11 or newer, this is $$($(PYTHON) --version 2>&1); try make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { sudo=; [ "$$(id -u)" -eq 0 ] || sudo=sudo; \
	    $$sudo apt-get update -qq && $$sudo apt-get install -y -qq --no-install-recommends python3-venv; }
	$(PYTHON) -m venv $(VENV)
