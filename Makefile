# Two commands do everything: `make reproduce` runs the experiment, `make test` the tests. Both create .venv first.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
# Small networks: one BLAS thread a process is fastest, and the trials run in parallel processes.
export OMP_NUM_THREADS := 1

.PHONY: reproduce quick bench test lint format types check clean
.DEFAULT_GOAL := reproduce

$(STAMP): pyproject.toml
	@echo "Creating .venv and installing kbt_rl into it (torch is the large part) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

reproduce: $(STAMP)  ## The paper's experiment: table, figures, TensorBoard runs in results/
	$(BIN)/python -m studies reproduce --full

quick: $(STAMP)  ## The same in a small version
	$(BIN)/python -m studies reproduce --quick

bench: $(STAMP)  ## Speed, growth and accuracy beside public peers in results/bench
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[dev,bench]"
	$(BIN)/python -m benchmarks

test: $(STAMP)  ## All tests, on two cores
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint types test

clean:
	rm -rf .venv results runs
