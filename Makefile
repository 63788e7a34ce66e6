# Everything sets itself up: `make run` and `make test` need Python 3.11 or later and nothing else.
PYTHON ?= python3
EXPERIMENT ?= demo
ARGS ?=
# Files of tests that run side by side; each brings ranks of its own, hence no more.
JOBS ?= 2
BIN := .venv/bin
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
# On a machine with GPUs the demo takes them all, in bf16; on a CPU it runs as it is written.
DEVICES := $(if $(filter-out 0,$(GPUS)),precision=bf16 launcher.nproc_per_node=$(GPUS))

# Hundreds of processes would each compile the sources anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-wide test-slow test-matrix test-faults test-scale test-slurm lint typecheck format docs setup clean bench

run: .venv/run
	$(BIN)/shardwright train experiment=$(EXPERIMENT) $(DEVICES) $(ARGS)

test: .venv/dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# What CI runs besides: whole runs, and the engines, world sizes and dtypes that `test` leaves out.
test-wide: .venv/dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS) \
		-m 'wide and not slow and not matrix and not slurm and not faults and not scale'

test-slow: .venv/dev
	$(BIN)/python -m pytest -m slow $(ARGS)

test-matrix: .venv/dev
	$(BIN)/python -m pytest -m matrix $(ARGS)

test-faults: .venv/dev
	$(BIN)/python -m pytest -m faults $(ARGS)

test-scale: .venv/dev
	$(BIN)/python -m pytest -m scale $(ARGS)

# Measures what this machine can, in half an hour at most, and writes benchmarks/results/TABLE.md and
# the README's rows. ARGS="--examples DIR" where the example scripts cannot be downloaded.
bench: .venv/bench
	$(BIN)/python -m pytest -m bench
	$(BIN)/python -m benchmarks $(ARGS)

# As root, with slurm-wlm, munge and iproute2 installed; a test that cannot run fails.
test-slurm: .venv/dev
	SHARDWRIGHT_REQUIRE_SLURM=1 $(BIN)/python -m pytest -m slurm $(ARGS)

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: .venv/dev
	$(BIN)/mypy

# The chapters as a site that needs no network; a broken link fails.
docs: .venv/docs
	$(BIN)/python -m docs.generate
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo site/index.html

setup: .venv/dev

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

.venv/bench: .venv/dev
	$(BIN)/pip install --quiet -c constraints.txt -e '.[bench]'
	touch $@

.venv/docs: .venv/run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	touch $@

clean:
	rm -rf .venv site .mypy_cache .ruff_cache .pytest_cache .hypothesis
