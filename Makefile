# From a fresh clone: `make demo`, `make test`, `make bench`. Each makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
DEMO_OUT ?= demo-out
BENCH_OUT ?= bench-out
BENCHMARKS := latency training start scale
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

demo: $(READY)
	$(BIN)/edgereg demo --out $(DEMO_OUT) --force

test: lint $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

.NOTPARALLEL: # with -j two benchmarks would time each other

# Against what people use today; hours on idle cores. `make bench QUICK=1`: a few minutes, machinery and direction.
bench:
	$(MAKE) --keep-going $(addprefix bench-,$(BENCHMARKS))

bench-%: $(READY)
	mkdir -p $(BENCH_OUT)
	$(BIN)/python benchmarks/$*.py $(if $(filter start,$*),--json $(BENCH_OUT)/start.json,--out $(BENCH_OUT)/$*) $(if $(QUICK),--quick)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'edgereg needs Python >= 3.10; found: '"$$($(PYTHON) --version)"'; remedy: make PYTHON=python3.12 ...'; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUT) $(BENCH_OUT) .mypy_cache .pytest_cache .ruff_cache
