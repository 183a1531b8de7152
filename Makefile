# Everything below needs only Python 3.11+ and make; the first run sets up .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2

.PHONY: demo test lint bench golden parity-matrix clean
.DELETE_ON_ERROR:

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(VENV)/ready
	PATH="$(CURDIR)/$(BIN):$$PATH" sh docs/demo.sh

# One thread in each of the processes: more would only wait for each other.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/ready
	$(BIN)/python -m benchmarks

parity-matrix: $(VENV)/ready
	$(BIN)/python -m benchmarks.matrix

golden: $(VENV)/ready
	$(BIN)/python tests/golden_plans.py

clean:
	rm -rf $(VENV) .demo .bench build dist *.egg-info
