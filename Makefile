# make demo      run a trained policy in a simulator: videos, success rates, a report page
# make test      run all tests except those marked slow
# make test-all  run all tests
# make lint      run ruff, mypy and the house rules
# make docs      build the documentation as a site: build/site/index.html
# make format    fix and format the code with ruff
# make clean     remove caches and build results; make distclean: also the environment
#
# Each target first creates .venv if it is missing or older than pyproject.toml and constraints.txt. Targets that render
# install OpenGL on Debian and Ubuntu (as root or with sudo) and otherwise name what is missing. Settings:
#   PYTHON=python3.12  the Python for .venv (3.11 or newer)
#   TORCH=cuda         PyTorch from PyPI, with CUDA on Linux (several GB), instead of the CPU wheels; remembered in .venv
#   ARGS="..."         further arguments for torchpi demo or pytest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= $(if $(wildcard $(VENV)/.installed-cuda),cuda,cpu)
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
ENV := $(VENV)/.installed-$(TORCH)

# Nothing is written to HOME, which may be read-only or missing (pip then disables its cache).
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

# One process per core, with one thread each.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --maxprocesses 8

test: $(ENV) opengl
	$(PYTEST) -m "not slow" $(ARGS)

# All tests of a file run in one process, so that shared fixtures are created once.
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

# The CPU index is used only if it responds, because pip would retry an unreachable one for every package. This probe skips
# certificate verification; pip verifies with its own certificates.
$(ENV): pyproject.toml client/pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "torchpi needs Python 3.11 or newer, and $(PYTHON) is older; choose another: make PYTHON=python3.12 ..." >&2; \
			exit 1; }; \
		echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	@for other in $(filter-out $@,$(wildcard $(VENV)/.installed-*)); do \
		$(BIN)/python -m pip uninstall --quiet --yes torch && rm "$$other" || exit 1; done
	@index=""; \
	if [ $(TORCH) = cpu ]; then \
		if $(BIN)/python -c 'import ssl, urllib.request; urllib.request.urlopen("$(CPU_INDEX)/torch/", timeout=5, context=ssl._create_unverified_context())' 2>/dev/null; \
		then index="--extra-index-url $(CPU_INDEX)"; \
		else echo "$(CPU_INDEX) does not respond: installing PyTorch from pip's default index"; fi; \
	fi; \
	echo "Installing torchpi and its dependencies (a few minutes the first time)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $$index --constraint constraints.txt --editable ./client --editable '.[dev]'
	@# For the server's tests. It requires NumPy 1 but works with 2.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps openpi-client
	@touch $@

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache client/.ruff_cache integrations/ros2/.ruff_cache .hypothesis
	find src client tests scripts benchmarks examples integrations -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
