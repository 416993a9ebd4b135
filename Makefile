# People and CI call these and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# NVIDIA's Python modules without the libraries behind them: what tests hold the TensorRT calls against.
TENSORRT_BINDINGS := $(addprefix $(VENV)/tensorrt-,10.16.1.11 11.4.0.106)

.PHONY: help setup demo test check bench format clean

help:  ## say what there is
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 10

setup: $(STAMP)  ## make .venv with the locked versions

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup  ## raw text -> tuned weights -> ONNX -> Triton -> answers (DEMO='--base NAME --serve none' passes options)
	$(BIN)/python demo/run.py $(DEMO)

$(VENV)/tensorrt-%: | $(STAMP)
	-$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ tensorrt-cu13-bindings==$*

test: setup $(TENSORRT_BINDINGS)  ## every test that this machine can run
	$(BIN)/python -m pytest $(PYTEST)

check: setup  ## lint, types, import rules, generated files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python benchmarks/readme_table.py --check

bench: setup  ## latency and throughput of the demo's bundle (BENCH='path/to/bundle --quick' passes others)
	$(BIN)/python benchmarks/run.py $(or $(BENCH),.demo/bundle --suite latency throughput --output reports/latest)

format: setup  ## rewrite sources the way `make check` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built (the virtual environment stays: delete .venv yourself)
	rm -rf build dist runtime/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .demo runs bundles reports
