# Everything a person types to build, test and try pageferry. Needs python3 (3.11 or newer) and the network once.

PYTHON ?=
ARGS ?=
BIN := .venv/bin
CONSTRAINTS := $(wildcard constraints/*.txt)
# The whole suite: a file's tests stay together, for they share sidecars.
IN_PARALLEL := -n 2 --dist loadfile
# A virtual environment whose interpreter is gone (never made, or Python upgraded) is made again.
NO_VENV := $(if $(wildcard $(BIN)/python),,no-venv)

.DEFAULT_GOAL := help

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

.PHONY: demo
demo: .venv/runtime.stamp ## Move a running guest between two sidecars on this machine (ARGS="--guest process")
	@$(BIN)/pageferry demo $(ARGS)

.PHONY: test
test: .venv/dev.stamp system-packages ## Run the whole test suite (ARGS="tests/core -k pacing")
	@PATH="$(CURDIR)/.make/bin:$$PATH:/usr/sbin:/sbin" $(BIN)/python -m pytest $(if $(ARGS),$(ARGS),$(IN_PARALLEL))

.PHONY: chaos
chaos: .venv/dev.stamp system-packages ## Kill and cut both hosts at every step of migrations, and print what became of the guests
	@PATH="$(CURDIR)/.make/bin:$$PATH:/usr/sbin:/sbin" PAGEFERRY_CHAOS=long $(BIN)/python -m pytest -q tests/chaos $(ARGS)

.PHONY: lint
lint: .venv/dev.stamp system-packages ## Check style, types, the protobuf contract, its stubs and the alert rules
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/buf lint
	$(BIN)/python tools/generate_stubs.py --check
	tools/promtool.sh check rules deploy/prometheus/alerts.yaml

.PHONY: bench
bench: .venv/dev.stamp ## Measure fault latency and throughput (ARGS=--json)
	@$(BIN)/python tests/bench/faults.py $(ARGS)

.PHONY: proto
proto: .venv/dev.stamp ## Write the Python stubs of proto/ again
	$(BIN)/python tools/generate_stubs.py

.PHONY: pin
pin: ## Refresh constraints/ to the newest releases that pyproject.toml allows
	@PYTHON="$(PYTHON)" tools/pin.sh

.PHONY: clean
clean: ## Remove the virtual environment and everything generated but the stubs
	rm -rf .venv .make .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
	find client service tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: system-packages
system-packages:
	@tools/system_packages.sh

.PHONY: no-venv
no-venv:

.venv/runtime.stamp: pyproject.toml tools/setup.sh $(CONSTRAINTS) $(NO_VENV)
	@PYTHON="$(PYTHON)" tools/setup.sh runtime

.venv/dev.stamp: pyproject.toml tools/setup.sh $(CONSTRAINTS) $(NO_VENV)
	@PYTHON="$(PYTHON)" tools/setup.sh dev
