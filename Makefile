# Each target sets up what it needs: a virtual environment, the pinned requirements, the built extensions. A second run
# does only what changed. On a machine without an NVIDIA GPU torch comes from the CPU index.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
ARGS ?=
comma := ,

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
SOURCES := setup.py $(shell find csrc -type f)
COMMIT := $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
TODAY := $(shell date -u +%Y-%m-%d)

.PHONY: help setup build demo test test-all docs lint format bench record report gpu new-cell fuzz odr sanitize sanitize-memory sanitize-threads clean

help:
	@echo "make demo    train language models on real text with our kernels, beside torch's (ARGS='--model lstm --steps 500')"
	@echo "make test    run the tests (ARGS='-k scan')"
	@echo "make docs    build the documentation site in build/docs"
	@echo "make test-all tests too what takes long: each Triton configuration for each architecture, each export"
	@echo "make lint    ruff, mypy, clang-format; 'make format' mends what can be mended"
	@echo "make bench   run the CPU benchmarks (ARGS='-k lstm') and print the table"
	@echo "make record  keep the last run of make bench under benchmarks/results; 'make report' fills the docs' tables from it"
	@echo "make gpu     run the GPU tests and benchmarks with the python3 and nvcc that are there, offline"
	@echo "make fuzz    call every C++ operator with random arguments (ARGS='--calls 50000 --seed 7')"
	@echo "make odr     check that no name of the C++ sources means two things (a minute)"
	@echo "make sanitize fuzz and test a build with gcc's sanitizers: of addresses and undefined behaviour, then of threads"
	@echo "make new-cell follow docs/adding-a-cell.md in a copy of the sources: build, lint, tests"
	@echo "make setup   only build; make clean removes what was built"

setup: build

demo: build
	$(BIN)/python examples/train_language_model.py $(ARGS)

# A thread that waits sleeps, and leaves its core to the other worker.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-all: export SEQACCEL_TEST_ALL = 1
test-all: test

docs: build $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -E -d build/doctrees docs build/docs

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

format: $(VENV)/.requirements
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

fuzz: build
	$(BIN)/python tests/fuzz_operators.py $(ARGS)

# Link-time optimisation stops before it makes code (flinker-output=rel): it has then compared all definitions.
ODR_FLAGS = -std=c++20 -O1 -Wno-psabi -flto -fopenmp -fPIC -Icsrc -DTORCH_TARGET_VERSION=0x020a000000000000 -DTORCH_STABLE_ONLY \
	$(shell $(BIN)/python -c 'import torch.utils.cpp_extension as c; print(*("-isystem " + p for p in c.include_paths()))')

odr: build
	@rm -rf build/odr && mkdir -p build/odr
	@flags='$(ODR_FLAGS)'; find csrc/cpu build/isa -name '*.cpp' | \
		xargs -P 2 -I{} sh -c "c++ $$flags -c {} -o build/odr/\$$(echo {} | tr / _).o"
	c++ -r -flto -flinker-output=rel -Wodr -Werror=odr build/odr/*.o -o build/odr/all.o

# Builds with sanitizers have folders of their own; their libraries must be loaded before Python. What torch leaks is its
# own affair; a call that asks for more memory than there is must raise, as it does in other builds.
sanitized = PYTHONPATH=$(CURDIR)/build/sanitize/$(1)/lib LD_PRELOAD="$(foreach library,$(2) stdc++,$(shell c++ -print-file-name=lib$(library).so))"
build_sanitized = SEQACCEL_SANITIZE=$(2) SEQACCEL_CUDA=0 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q \
	build_py --build-lib build/sanitize/$(1)/lib \
	build_ext --build-temp build/sanitize/$(1)/objects --build-lib build/sanitize/$(1)/lib
MEMORY = UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	ASAN_OPTIONS=detect_leaks=0:allow_user_segv_handler=0:allocator_may_return_null=1:max_allocation_size_mb=4096 \
	$(call sanitized,memory,asan ubsan)
THREADS = TSAN_OPTIONS=exitcode=66 \
	$(call sanitized,threads,tsan)
SANITIZED_TESTS = native scan scan_sru scan_operators conv attention rnn rnn_operator rnn_bfloat16 session

sanitize: sanitize-memory sanitize-threads

sanitize-memory: $(VENV)/.installed
	$(call build_sanitized,memory,address$(comma)undefined)
	cd tests && $(MEMORY) $(abspath $(BIN)/python) fuzz_operators.py --calls 5000
	cd tests && $(MEMORY) $(abspath $(BIN)/pytest) -q -x -m "not gpu and not timed" -k "not triton and not configurations and not memory_of_dead_ones" \
		$(SANITIZED_TESTS:%=test_%.py) $(ARGS)

sanitize-threads: $(VENV)/.installed
	$(call build_sanitized,threads,thread)
	cd tests && $(THREADS) $(abspath $(BIN)/python) fuzz_threads.py --openmp 1
	cd tests && $(THREADS) $(abspath $(BIN)/python) fuzz_threads.py --openmp 2

new-cell: build
	$(BIN)/python tests/new_cell.py

bench: build
	@mkdir -p runs
	$(BIN)/pytest benchmarks -m "not gpu" --benchmark-json=runs/benchmarks.json $(ARGS)
	$(BIN)/python -m benchmarks.report runs/benchmarks.json --plots runs/plots

# Keeps the last run of `make bench` as the record of this machine, and fills the pages' tables from all records.
record:
	$(BIN)/python -m benchmarks.records runs/benchmarks.json

report: build
	$(BIN)/python -m benchmarks.pages
	$(BIN)/python -m benchmarks.results

build: $(VENV)/.built

$(VENV)/.requirements: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "seqaccel needs Python 3.10 or later; set PYTHON")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 1 $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) $$(grep '^torch==' requirements.txt)
	$(PIP) install -r requirements.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml
	SEQACCEL_NO_EXTENSIONS=1 $(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.docs: $(VENV)/.requirements docs/requirements.txt
	$(PIP) install -r docs/requirements.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py -q build_ext --inplace
	@touch $@

# The package is installed into build/gpu with the interpreter that is there; the tests and benchmarks run against that.
GPU_PYTHON = PYTHONPATH=$(CURDIR)/build/gpu:$$PYTHONPATH $(PYTHON)

gpu:
	@$(PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "make gpu: this torch sees no GPU")'
	$(PYTHON) -m pip install -q --no-index --no-deps --no-build-isolation --upgrade --target build/gpu .
	cd tests && $(GPU_PYTHON) -m pytest -m gpu $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null) $(ARGS)
	@set -e; gpu=$$($(PYTHON) -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))'); \
	result=$(CURDIR)/benchmarks/results/$$gpu/$(TODAY)-$(COMMIT).json; mkdir -p $$(dirname $$result); \
	(cd benchmarks && $(GPU_PYTHON) -m pytest -m gpu --benchmark-json=$$result . $(ARGS)); \
	$(GPU_PYTHON) -m benchmarks.report $$result; echo $$result

clean:
	rm -rf build dist *.egg-info runs seqaccel/*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	rm -f $(VENV)/.built $(VENV)/.docs $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
