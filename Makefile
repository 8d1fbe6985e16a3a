# Every target first makes .venv with the versions pinned in requirements-dev.txt. With PYTHON=... on the command line
# that interpreter is used as it is, and nothing is installed. ARGS=... goes to the program behind the target.

ifeq ($(origin PYTHON),command line)
  RUN := PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(PYTHON)
  READY :=
  APART :=
else
  RUN := .venv/bin/python
  READY := .venv/.ready
  APART := .venv/frameworks/.ready
endif
BASE_PYTHON ?= python3
PIP := .venv/bin/python -m pip --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.PHONY: help demo test coverage test-gpu test-zoo test-matrix aot release-check check layout format docs bench bench-all clean

help: ## this list
	@echo 'make TARGET [ARGS="..."] [PYTHON=python3]'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-15s%s\n", $$1, $$2 }' Makefile

demo: $(READY) ## train a small Llama without and with the library, and compare
	@$(RUN) -m examples.demo $(ARGS)

# one torch thread per worker: more workers than that fight over the cores
test: $(READY) $(APART) ## the whole test suite
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS) tests

coverage: ## the same, and the lines of src/liger_kernel that no test runs
	@$(MAKE) test ARGS="--cov --cov-report=term-missing:skip-covered $(ARGS)"

test-gpu: $(READY) ## what needs a GPU: PYTHON=python3 with a GPU build of torch
	@$(RUN) -c 'import sys, torch; torch.cuda.is_available() or torch.xpu.is_available() or sys.exit("make test-gpu: torch " + torch.__version__ + " sees no GPU. Name an interpreter whose torch does: make test-gpu PYTHON=python3")'
	$(RUN) -m pytest $(ARGS) tests/gpu tests/ops tests/test_reach.py

# every type that transformers ships, where `make test` takes an eighth
test-zoo: $(READY) ## patch every model type of transformers
	ZOO=all OMP_NUM_THREADS=1 $(RUN) -m pytest -n logical --maxprocesses 8 $(ARGS) tests/transformers/test_zoo.py

# oldest and newest of Python, torch, Triton and transformers: the rows of tests/matrix.txt, or some of them, as with
# ARGS="oldest newest -- -k rms_norm"
test-matrix: $(READY) ## oldest and newest Python, torch, Triton, transformers
	$(RUN) -m tests.matrix $(ARGS)

# every kernel compiled for GPUs that are not there; docs/hardware.md holds what was found. ARGS=--write renews it
aot: $(READY) ## compile every kernel for GPUs that are not there
	@nice -n 15 $(RUN) -m tests.aot $(ARGS)

# wheel and sdist: built, looked into, installed into environments of their own, used; ARGS="--out dist" keeps them
release-check: $(READY) ## build wheel and sdist, install them, use them
	$(RUN) -m tests.release $(ARGS)

check: $(READY) ## lint, format, types, layout
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_layout.py

layout: $(READY) ## the layout test alone
	@$(RUN) -m pytest tests/test_layout.py

format: $(READY) ## format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# NO_MKDOCS_2_WARNING: no advertisement among the warnings
docs: $(READY) ## the site, into build/site
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --clean $(ARGS)
	@echo "build/site/index.html; with search: python3 -m http.server --directory build/site"

bench: $(READY) ## time an op beside PyTorch: OP=rms_norm
	$(RUN) -m benchmark run $(OP) $(ARGS)

TABLES = README.md docs/performance.md docs/problems/out-of-memory.md docs/problems/preference-and-rl.md
# everything beside its peers, then tables and plots: most of an hour of a GPU, on a machine that does nothing else
bench-all: $(READY) ## all measurements, tables and plots: PEERS=dir
	@test -d "$(PEERS)" || { echo "make bench-all PEERS=dir, made by: pip install --target dir --no-deps liger-kernel cut-cross-entropy"; exit 1; }
	$(RUN) -m benchmark run --peer-site $(PEERS) $(ARGS)
	$(RUN) -m benchmark run fused_linear_cross_entropy --sweep --mode full --peer-site $(PEERS) $(ARGS)
	$(RUN) -m benchmark e2e --modes patched,incumbent,stock,compile,patched+compile --peer-site $(PEERS)
	$(RUN) -m benchmark losses --modes ours,eager,incumbent --peer-site $(PEERS)
	$(RUN) -m benchmark host
	results=$$($(RUN) -m benchmark results) && $(RUN) -m benchmark tables $$results $(TABLES) && $(RUN) -m benchmark plots $$results

clean: ## remove .venv and everything that was made
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist demo_output src/*.egg-info

.venv/.ready: requirements-dev.txt pyproject.toml
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, found " + sys.version.split()[0] + ". Name another one: make BASE_PYTHON=python3.12")'
	test -x .venv/bin/python || $(BASE_PYTHON) -m venv .venv
	@echo "Installing the pinned requirements into .venv (once; a few minutes with a slow network) ..."
	$(PIP) install "$$(grep '^torch==' requirements-dev.txt)"
	$(PIP) install -r requirements-dev.txt
	$(PIP) install --no-deps --no-build-isolation -e .
	$(PIP) install --no-deps --upgrade --target .venv/kernels $$(sed -n 's/^# apart: //p' requirements-dev.txt)
	@touch $@

# where the index lacks one of them, the tests that need them are skipped, and say so
.venv/frameworks/.ready: tests/framework_wheels.txt | .venv/.ready
	@$(PIP) install --no-deps --no-build-isolation --upgrade --ignore-requires-python --target .venv/frameworks -r $< \
	  && touch $@ || echo "make: without .venv/frameworks the adapters of frameworks, Lightning and DeepSpeed are not tested"
