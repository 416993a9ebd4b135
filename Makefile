# People and CI call these and nothing else.
PYTHON ?= python3
VENV := .venv
# The lock is for one Python; on another, run with CONSTRAINTS= EXTRAS=test.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= dev
# GPU=1 takes the engines for NVIDIA GPUs in place of ONNX Runtime for CPUs, which has the same import name.
ifdef GPU
ENGINES := gpu,tensorrt
OTHER := onnxruntime
else
ENGINES := cpu
OTHER := onnxruntime-gpu
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed$(if $(GPU),-gpu)
# NVIDIA's Python modules without the libraries behind them: tests check calls of TensorRT against them.
TENSORRT_BINDINGS := $(addprefix $(VENV)/tensorrt-,10.16.1.11 11.4.0.106)

# Tests run in parallel; tests of one file share a worker. TEST_WORKERS=0 runs them in one process. Three suit two cores:
# tests of servers wait a third of their time.
TEST_WORKERS ?= 3
RUN_TESTS = $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder
ROOMS := $(sort $(foreach file,$(wildcard tests/*/test_*.py tests/*/*/test_*.py),$(word 2,$(subst /, ,$(file)))))
ifneq ($(filter-out $(ROOMS),$(ROOM)),)
$(error ROOM=$(ROOM) does not exist: choose one of $(ROOMS))
endif
TESTED = $(addprefix tests/,$(ROOM))

.PHONY: help setup demo test test-fast check docs bench format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with the locked versions (GPU=1: for a machine with an NVIDIA GPU)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip uninstall --quiet --quiet --yes $(OTHER)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS)) \
	  -e '.[$(EXTRAS),$(ENGINES)]'
	rm -f $(VENV)/.installed* && touch $@

demo: setup  ## raw text -> tuned weights -> ONNX -> Triton -> answers (DEMO='--base NAME --serve none' passes options)
	$(BIN)/python demo/run.py $(DEMO)

$(VENV)/tensorrt-%: | $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ tensorrt-cu13-bindings==$*

# One OpenMP thread a worker: two workers with two threads each are slower on two cores.
test test-fast: export OMP_NUM_THREADS ?= 1
test test-fast: export MKL_NUM_THREADS ?= 1
# Where an image forbids it, each of the tests' processes compiles all modules anew: half a second each.
test test-fast: export PYTHONDONTWRITEBYTECODE :=

test: setup $(TENSORRT_BINDINGS)  ## every test that this machine can run (ROOM=export: one room; PYTEST='-k packing' passes options)
	$(RUN_TESTS) --durations=20 $(TESTED) $(PYTEST)

test-fast: setup  ## tests without traced graphs, tuned encoders, servers and other processes: about a minute and a half
	$(RUN_TESTS) --fast $(TESTED) $(PYTEST)

check: setup  ## lint, types, import rules, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/readme_table.py --check

docs: setup  ## build the documentation site into site/, strictly
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup  ## latency and throughput of the demo's bundle (BENCH='path/to/bundle --quick' passes others)
	$(BIN)/python benchmarks/run.py $(or $(BENCH),.demo/bundle --suite latency throughput --output reports/latest)

format: setup  ## rewrite sources the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built (the virtual environment stays: delete .venv yourself)
	rm -rf build dist runtime/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo runs bundles reports
