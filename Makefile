# make test, make demo: on a fresh clone these set up .venv and run. Needs Python >= 3.11, a C++ compiler and make.
.PHONY: help install test test-all kills labels ray demo lint types aot cuda-check bench bench-train bench-smoke gpu docs clean
.DEFAULT_GOAL := help

# The first Python of 3.11 or later; `make BASE_PYTHON=... install` chooses another.
BASE_PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PYTHON := .venv/bin/python
# A machine with a GPU may have no network, and with it no .venv: then the Python that has torch with CUDA.
PYTHON_GPU ?= $(if $(wildcard $(PYTHON)),$(PYTHON),python3)
PART ?= ops
# Each with one thread for torch (tests/conftest.py). A file's tests stay together: what they share is made once.
TWO_PROCESSES := -n 2 --dist loadfile

help:
	@echo "make install      .venv with fastsimgan in it, editable (every target below does this first)"
	@echo "make test         the tests but for the slow ones: five minutes on two cores"
	@echo "make test-all     all tests, as CI runs them"
	@echo "make kills        refinement killed 300 times over 25 datasets, and nothing lost: a quarter of an hour"
	@echo "make labels       10,000 images of each kind of input, and no label changed: four minutes"
	@echo "make ray          ten runs on a local Ray cluster, a worker killed in each: two minutes"
	@echo "make demo         train, refine and evaluate on the built-in eyes, into runs/demo"
	@echo "make lint types   ruff, mypy"
	@echo "make aot          compile every kernel for sm_80, sm_90, sm_100; needs no GPU"
	@echo "make cuda-check   the CUDA path with no GPU, on the oldest and the newest torch: 12 GB under .venv-cuda, once"
	@echo "make bench        all benchmarks; bench-smoke: the short ones, each once"
	@echo "make bench-train  an iteration of training against a plain PyTorch trainer of the same networks, CPU-seconds"
	@echo "make gpu [PART=ops]   build, GPU tests and benchmarks on a machine with a GPU; another PART: a list"
	@echo "make docs         the pages of docs/ as a site in site/, every link checked; its tools go into .venv-docs"
	@echo "make clean        remove what was built, and .venv"

install: .venv/installed

# What the install depends on. Python files do not: the install is editable.
.venv/installed: pyproject.toml setup.py CMakeLists.txt requirements-dev.txt $(wildcard csrc/*)
	@test -n "$(BASE_PYTHON)" || { echo "error: Python >= 3.11 is needed, none found; give BASE_PYTHON=..."; exit 1; }
	test -x $(PYTHON) || $(BASE_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-build-isolation -e .
	@touch $@

test: install
	$(PYTHON) -m pytest $(TWO_PROCESSES) -m "not slow" tests

test-all: install
	$(PYTHON) -m pytest $(TWO_PROCESSES) tests

kills: install
	FASTSIMGAN_KILLS=325 FASTSIMGAN_KILL_SETS=25 $(PYTHON) -m pytest -s tests/refinement/test_exactly_once.py -k test_kills

labels: install
	FASTSIMGAN_LABELS=10000 $(PYTHON) -m pytest -s tests/refinement/test_labels.py

ray: install
	FASTSIMGAN_RAY_RUNS=10 $(PYTHON) -m pytest -s tests/refinement/test_ray_workers.py

demo: install
	$(PYTHON) -m fastsimgan.demo

lint: install
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types: install
	$(PYTHON) -m mypy

aot: install
	$(PYTHON) -m bench.aot

# CUDA_PYTHONS="/a/bin/python /b/bin/python" takes Pythons that have torch with CUDA; CUDA_CHECK=--require skips nothing.
cuda-check: install
	$(PYTHON) -m bench.cuda_check $(CUDA_CHECK)

bench: install
	$(PYTHON) -m pytest bench --benchmark-only

bench-train: install
	$(PYTHON) -m bench.bench_train_step

# Each benchmark that is not marked large once, untimed: it proves that they run and that what they time is right.
bench-smoke: install
	$(PYTHON) -m pytest bench -m "not large" --benchmark-disable

gpu:
	$(PYTHON_GPU) -m bench.gpu $(PART)

docs: .venv-docs/installed
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict --clean
	@echo "site/index.html (its search needs a server: python3 -m http.server -d site)"

# An environment of its own, so that `make install` stays as small as it is; the package is read, not imported.
.venv-docs/installed: requirements-docs.txt
	@test -n "$(BASE_PYTHON)" || { echo "error: Python >= 3.11 is needed, none found; give BASE_PYTHON=..."; exit 1; }
	test -x .venv-docs/bin/python || $(BASE_PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

clean:
	rm -rf .venv .venv-cuda .venv-docs site build dist *.egg-info fastsimgan/*.so .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
