# make demo      a trained policy acts in a simulator: videos, a table of successes, a page with everything
# make test      the tests but for those marked slow
# make test-all  all tests
# make lint      ruff, mypy and the rules of this house
# make docs      the documentation as a site: build/site/index.html
# make format    let ruff fix and format the code
# make clean     remove caches and build results; make distclean: the environment too
#
# Each of them first makes .venv, where it is missing or older than pyproject.toml and constraints.txt. Those that render
# install OpenGL for it on Debian and Ubuntu, as root or with sudo, and otherwise name what is missing. Settings:
#   PYTHON=python3.12  the Python (3.11 or newer) that .venv is made with
#   TORCH=cuda         PyTorch as PyPI has it, on Linux with CUDA (several GB), instead of the CPU's wheels; .venv remembers it
#   ARGS="..."         more arguments for torchpi demo or pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(if $(wildcard $(VENV)/.installed-cuda),cuda,cpu)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ENV := $(VENV)/.installed-$(TORCH)

# Nothing is written to HOME, which may be read-only or not exist (pip then goes without its cache by itself).
MPLCONFIGDIR ?= $(CURDIR)/$(VENV)/matplotlib
export MPLCONFIGDIR

ifeq ($(filter cpu cuda,$(TORCH)),)
$(error TORCH is "$(TORCH)": it must be cpu or cuda)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help opengl demo test test-slow test-all lint docs format clean distclean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

opengl: $(ENV)
	@sh scripts/install_opengl.sh $(BIN)/python

demo: $(ENV) opengl
	$(BIN)/torchpi demo $(ARGS)

# A process per core, each with one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

test: $(ENV) opengl
	$(PYTEST) -m "not slow" $(ARGS)

# A file's tests in one process: what they share is made once.
test-slow: $(ENV) opengl
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m slow $(ARGS)

test-all: test test-slow

lint: $(ENV)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python scripts/lint_house.py

docs: $(ENV)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: $(ENV)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The CPU index is offered only if it answers: pip would retry a silent one for every package. The question goes without
# checking the certificate, which pip does itself, with the certificates that it is set up with.
$(ENV): pyproject.toml client/pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "torchpi needs Python 3.11 or newer, and $(PYTHON) is not; name another one: make PYTHON=python3.12 ..." >&2; \
			exit 1; }; \
		echo "Making $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@for other in $(filter-out $@,$(wildcard $(VENV)/.installed-*)); do \
		$(BIN)/python -m pip uninstall --quiet --yes torch && rm "$$other" || exit 1; done
	@index=""; \
	if [ $(TORCH) = cpu ]; then \
		if $(BIN)/python -c 'import ssl, urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5, context=ssl._create_unverified_context())' 2>/dev/null; \
		then index="--extra-index-url $(CPU_INDEX)"; \
		else echo "$(CPU_INDEX) does not answer: taking the PyTorch that pip finds elsewhere"; fi; \
	fi; \
	echo "Installing torchpi and what it needs (a few minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$index --constraint constraints.txt --editable ./client --editable '.[dev]'
	@# For the tests of the server. It asks for NumPy 1, but works with 2.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps openpi-client
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache client/.ruff_cache integrations/ros2/.ruff_cache .hypothesis
	find src client tests scripts benchmarks examples integrations -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
