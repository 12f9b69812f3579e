# `make demo` runs the main job, `make test` the tests. Both need only Python 3.11 or newer; the rest goes into .venv,
# which is built anew when pyproject.toml or constraints.txt changes. Another Python: `make demo PYTHON=python3.12`.

PYTHON ?= python3

SHELL := /bin/bash
.DEFAULT_GOAL := help

bin := .venv/bin
pip_install := $(bin)/python -m pip install --disable-pip-version-check -c constraints.txt
runtime := .venv/.runtime-installed
dev := .venv/.dev-installed

.PHONY: help demo test evidence gpu lint format types check clean

help:  ## show this list
	@sed -nE 's/^([a-z]+):.*  ## (.*)/  make \1\t\2/p' Makefile | expand -t 16

demo: $(runtime)  ## train a ResNet-5 on digits without a backward pass, beside backpropagation
	$(bin)/onward train --model resnet5 --data digits --compare-bp

test: $(dev)  ## run the tests on two cores
	OMP_NUM_THREADS=1 $(bin)/pytest -n 2 --dist worksteal

evidence: $(dev)  ## run every experiment of docs/evidence.md and write it anew (half an hour)
	$(pip_install) -e '.[dev,mnist]'
	$(bin)/python benchmarks/evidence

gpu: $(dev)  ## on a GPU: its tests and its benchmarks, into gpu-results (ten minutes)
	benchmarks/gpu.sh

lint: $(dev)  ## check style and format
	$(bin)/ruff check
	$(bin)/ruff format --check

format: $(dev)  ## mend what can be mended by itself
	$(bin)/ruff check --fix
	$(bin)/ruff format

# mypy knows nothing of setuptools' package-dir, so it sees the package as links in the shape of an installation.
# Its messages then name the real files again: onward/compiler/x.py is compiler/x.py.
types: $(dev)  ## check types
	@rm -rf build/types/onward build/types/tests
	@mkdir -p build/types/onward
	@ln -s "$(CURDIR)"/onward/*[!_] "$(CURDIR)"/{compiler,passes,runtime,models,evidence} build/types/onward/
	@ln -s "$(CURDIR)/tests" build/types/
	@set -o pipefail; cd build/types && MYPYPATH="$(CURDIR)/tests" "$(CURDIR)/$(bin)/mypy" -p onward -p tests \
	  | sed -E 's#^onward/(compiler|passes|runtime|models|evidence)/#\1/#'

check: lint types test  ## everything that has to pass

clean:  ## remove the virtual environment and every build product
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(runtime): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "Onward needs Python 3.11 or newer; '$(PYTHON)' is: $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	    "Name another one, for example: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(pip_install) -e '.[torch]'
	@touch $@

$(dev): $(runtime)
	$(pip_install) -e '.[dev]'
	@touch $@
