# make env | train | test | test-thorough | test-native | lint | results | docs | bench | clean   (each sets up .venv first; see CONTRIBUTING.md)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
RUN ?= runs/first
DATA ?= data/synth
BUDGET ?= 300

BIN := $(CURDIR)/.venv/bin
ENV := .venv/.up-to-date
PEERS := .venv/.peers
NATIVE := setup.py CMakeLists.txt $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# Microbenchmarks: bench/ without what they share, the makers of data and pictures, and what trains for an hour or reads
# such trainings.
BENCHES := $(filter-out bench/harness.py bench/picture.py bench/tasks.py bench/criterion.py \
  $(wildcard bench/quality*.py bench/replay_*.py bench/data_*.py bench/convlstm_*.py),$(wildcard bench/*.py))
# One set of versions for the environment and for the isolated builds inside it (two names: old and new pip).
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(PIP_CONSTRAINT)

.PHONY: help env train test test-thorough test-native lint results docs bench clean

help:
	@sed -n 1p Makefile

env: $(ENV)

$(ENV): constraints.txt pyproject.toml $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[test,dev,docs]'
	touch $@

train: $(ENV)
	test -f $(DATA)/dataset.json || $(BIN)/python -m rlv2v.synth $(DATA)
	$(BIN)/python -m rlv2v.train --out $(RUN) --budget $(BUDGET) \
	  $(if $(wildcard $(RUN)/config.json),--resume,--preset paint --data $(DATA) --augment dihedral)
	$(BIN)/python -m rlv2v.evaluate $(RUN) --data $(DATA) --split test --json $(RUN)/evaluation.json
	$(BIN)/python -m rlv2v.report $(RUN)

# One process a core, and one thread each: small tensors gain nothing from more.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(shell nproc) --dist worksteal

test: $(ENV)
	$(PYTEST) -m "not thorough"

# The libraries that benches and their tests run beside ours.
$(PEERS): $(ENV)
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

# What takes long, with oneDNN and torch held to AVX2; the layers' own tests once more as the CPU is.
test-thorough: $(PEERS) test-native
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m thorough
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(PYTEST) -m "not thorough" tests/kernels tests/model tests/method
	$(PYTEST) -m thorough tests/kernels tests/model

# The C++ core under AddressSanitizer and UBSan, then under ThreadSanitizer.
test-native: $(ENV)
	for sanitize in address,undefined thread; do \
	  PATH=$(BIN):$$PATH cmake -S . -B build/$$sanitize -G Ninja -DRLV2V_PYTHON=OFF -DRLV2V_TESTS=ON \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DRLV2V_SANITIZE=$$sanitize; \
	  $(BIN)/cmake --build build/$$sanitize; \
	  $(BIN)/ctest --test-dir build/$$sanitize --output-on-failure --no-tests=error; \
	done

bench: $(ENV)
	for bench in $(BENCHES); do $(BIN)/python $$bench; done

lint: $(ENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/check.py
	$(BIN)/python docs/figures.py

# The tables and figures of README.md and docs/, from the JSON files in bench/results/.
results: $(ENV)
	$(BIN)/python docs/figures.py --write

docs: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf build dist .venv rlv2v/*.so *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
