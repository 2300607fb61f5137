# One vocabulary for people and CI. Every target makes the environment when it is missing.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: env demo test test-long fuzz versions check format docs bench dist smoke
.DEFAULT_GOAL := test

env: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[train,export,cluster,docs,dev]"
	touch $@

demo: env        ## learn strides on a built-in set; a table and pictures at the end
	$(BIN)/diffstride demo

test: env        ## the tests that every change must pass
	$(BIN)/pytest -n auto

test-long: env   ## all tests, the slow ones too
	$(BIN)/pytest -n auto -m "long or not long"

fuzz: env        ## 20,000 random calls against the naive formulas, from a new seed (ten minutes)
	$(BIN)/python -m tools.fuzz --out results/fuzz-cpu.json

versions: env    ## the tests with the lowest and newest of each dependency, on several Pythons (half an hour, 30 GB)
	$(BIN)/python -m tools.versions --out results/versions.json

check: env       ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: env      ## rewrite the files as `make check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: env        ## the documentation as a site, in build/site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: env       ## speed and memory against the alternatives, side by side on this machine
	MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 \
		$(BIN)/diffstride bench --out results/bench-cpu.json

dist: env        ## the wheel and the source archive, in dist/
	rm -rf build dist
	$(BIN)/python -m build --outdir dist .

smoke: dist      ## what is in dist/, installed in empty environments, does its work
	tools/smoke.sh $(PYTHON)
