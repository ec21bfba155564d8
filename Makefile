# `make demo` and `make test` are all that a newcomer needs; each sets the environment up first.
PYTHON ?= python3
BIN := .venv/bin
# Three processes share the tests, of which one mostly waits for Ray; tests that share a slow fixture
# run in the same one (conftest.py).
# Plugins that only the slow tests use take seconds to load, in every process.
PYTEST := $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder \
	-p no:schemathesis -p no:hypothesispytest

.PHONY: demo demo-dreambooth serve test test-unit test-all wheel-check check format bench starter
.PHONY: help reference pictures docs setup clean image kuberay

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.* ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 18

demo: setup ## make a data set with the starter model and say where to look
	$(BIN)/python -m rayjobs generate configs/demo/generate.yaml

demo-dreambooth: setup ## teach the starter model a subject from four pictures
	$(BIN)/python -m rayjobs dreambooth configs/demo/dreambooth.yaml

serve: setup ## an image API and a page on http://127.0.0.1:8000, until Ctrl-C
	$(BIN)/python -m serve run configs/demo/serve.yaml

test: setup ## everything that runs in a few minutes without a GPU
	$(PYTEST) -m "not slow and not gpu"

test-unit: setup ## the inner loop: no Ray, no network for seconds, nothing slow
	$(PYTEST) -m "not slow and not gpu and not ray and not model"

test-all: setup ## the slow tests too, one at a time: some measure seconds
	$(BIN)/python -m pytest

wheel-check: setup ## build a wheel and use it outside the clone
	.ci/wheel $(BIN)/python

check: setup ## lint, format, types, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## the engine against diffusers' own pipeline, the job against the engine
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.job

starter: setup ## train the starter model and its ControlNet again, from nothing
	$(BIN)/python -m rayjobs.starter.train --out rayjobs/starter/model
	$(BIN)/python -m rayjobs.starter.control --out rayjobs/starter/outlines

IMAGE ?= rayjobs
BUILDER ?= docker
image: ## the container images rayjobs:gpu and rayjobs:cpu; BUILDER=podman, IMAGE=registry/name
	$(BUILDER) build --target gpu -t $(IMAGE):gpu .
	$(BUILDER) build --target cpu -t $(IMAGE):cpu .

kuberay: setup ## copy cluster.yaml's spec and configs/serve.yaml into deploy/kuberay's manifests
	$(BIN)/python -m deploy.kuberay.render

reference: setup ## docs/reference.md from the models' docstrings
	$(BIN)/python -m docs.reference

pictures: setup ## the README's pictures, by the starter model
	$(BIN)/python -m docs.pictures

docs: setup ## the site, into build/site
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

define CHECK_PYTHON
import sys
told = f"rayjobs needs Python 3.11 or newer, and {sys.executable} is {sys.version.split()[0]}"
sys.exit(None if sys.version_info >= (3, 11) else f"{told}; name another one: make PYTHON=python3.12")
endef
export CHECK_PYTHON

setup: .venv/installed

# python -m venv needs no more than Python itself; versions come from constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "$$CHECK_PYTHON"
	@$(BIN)/python -c "$$CHECK_PYTHON" 2>/dev/null || rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build
