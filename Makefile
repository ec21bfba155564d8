# `make demo` and `make test` are all that a newcomer needs; each sets the environment up first.
PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for work sleep: tests run beside each other's processes on few cores.
test test-all: export OMP_WAIT_POLICY = passive

.PHONY: demo demo-dreambooth serve test test-all check format bench starter setup clean
.PHONY: reference pictures docs

demo: setup ## make a data set with the starter model and say where to look
	$(BIN)/python -m rayjobs generate configs/demo/generate.yaml

demo-dreambooth: setup ## teach the starter model a subject from four pictures
	$(BIN)/python -m rayjobs dreambooth configs/demo/dreambooth.yaml

serve: setup ## an image API and a page on http://127.0.0.1:8000, until Ctrl-C
	$(BIN)/serve run configs/demo/serve.yaml

test: setup ## everything that runs in a few minutes without a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: setup ## the slow tests too
	$(BIN)/python -m pytest

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

starter: setup ## train the starter model again, from nothing
	$(BIN)/python -m rayjobs.starter.train --out rayjobs/starter/model

reference: setup ## docs/reference.md from the models' docstrings
	$(BIN)/python -m docs.reference

pictures: setup ## the README's pictures, by the starter model
	$(BIN)/python -m docs.pictures

docs: setup ## the site, into build/site
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	$(BIN)/mkdocs build --strict

setup: .venv/installed

# python -m venv needs no more than Python itself; versions come from constraints.txt.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv demo build
