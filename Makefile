# make demo | make test | make lint | make format | make docs | make fuzz | make bench | make census | make clean
# Each creates .venv and installs what it needs; a second call finds that done.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint format clean

demo: $(VENV)/.installed-demo
	$(BIN)/bnfuse demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages as a site in build/site; a link that leads nowhere, and a page that is in no menu, stops it.
.PHONY: docs
docs: $(VENV)/.installed-docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site
	@echo open build/site/index.html

# One pip call per environment: torch and torchvision must be resolved together to match.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable '.[$*]'
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# make fuzz ARGS="--count 20000 --jobs 2" or ARGS="--seconds 3600"
.PHONY: fuzz
fuzz: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m fuzz $(or $(ARGS),--count 20000 --jobs 2)

# make bench ARGS="fusing growth --networks 'resnet*'" for a part, ARGS=--quick to see that it runs
.PHONY: bench
bench: $(VENV)/.installed-dev
	PYTHONPATH=. $(BIN)/python -m bench $(ARGS)

# Every model of three zoos; continues where the last run stopped. make census ARGS="--match 'resnet*' --jobs 1"
.PHONY: census
census: $(VENV)/.installed-dev
	@status=0; \
	for zoo in torchvision timm pytorchcv; do \
		for part in "" --sample --restructure; do \
			$(BIN)/bnfuse census $$zoo --output docs/census/$$zoo.jsonl.gz $$part $(ARGS) || status=1; \
		done; \
	done; \
	$(BIN)/python -m bnfuse.tools.census.page docs; \
	exit $$status
