# Two commands: `make demo` does the main job on a real model, `make test` runs the tests. See README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CORE := .venv-core
EXTRAS := local,bench,tune,ray,ledger,prices,docs,test,lint,serve,count

ARITHMETIC := $(wildcard src/thrifty/bench/plans/arithmetic/*.toml) recipes/plans/budget-prompt.toml recipes/plans/no-thinking.toml

.PHONY: setup models demo picture thinker-catalogue test check lint types docs slow blackbox bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	touch $@

models: setup
	$(BIN)/thrifty models get smollm2 minilm

demo: models
	$(BIN)/thrifty frontier demo --model smollm2 --out out/demo

# The README's picture and the catalogue: hours on two cores; started again, it goes on where it stopped.
picture: models
	$(BIN)/thrifty frontier retrieval --n 400 --model smollm2 --out out/picture
	$(BIN)/thrifty frontier arithmetic --n 400 --model smollm2 --out out/picture \
	  $(foreach p,$(ARITHMETIC),--plan $(p))
	$(BIN)/thrifty frontier --from out/picture/results.jsonl --out out/picture --save results
	cp out/picture/frontier.png docs/frontier.png
	$(BIN)/python docs/generate.py

# Every method that applies to the thinker, three settings each, and pairs of families: hours; goes on where it stopped.
thinker-catalogue: setup
	$(BIN)/thrifty frontier thinker-catalogue thinker-pairs --n 400 --model thinker --out out/thinker-catalogue \
	  --save results
	$(BIN)/python docs/generate.py

test: models
	$(BIN)/python -m pytest -m "not slow" --ignore tests/blackbox

check: lint types docs slow blackbox

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

docs: setup
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir out/site

slow: models
	$(BIN)/python -m pytest -m slow --ignore tests/blackbox

# As a user without torch has it: only the core, in a venv of its own.
blackbox: $(CORE)/.ready
	$(CORE)/bin/python -m pytest -p no:cacheprovider tests/blackbox

$(CORE)/.ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . pytest pytest-asyncio pytest-timeout
	touch $@

clean:
	rm -rf $(VENV) $(CORE) out
