# make demo   install into .venv, train on scikit-learn's digits, show the result
# make test   install into .venv, check style and types, run the tests
# make timm-contract   timm's own tests on every image model
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo

.PHONY: demo test lint slow timm-contract install clean

demo: install
	$(BIN)/mambaverse train vision/digits trainer.run_name=demo trainer.overwrite=true
	$(BIN)/mambaverse eval $(RUN)
	@echo "The pictures are in $(RUN): curves.png, confusion.png, predictions.png"

# A process a core; one that is done takes half of what another has left. Each has 1 or 2 GB of memory.
test: install lint
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

slow: install
	$(BIN)/python -m pytest -m slow

timm-contract: install
	$(BIN)/python -m pytest -m slow tests/tasks/vision/test_timm_contract.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mambaverse needs Python 3.11 or newer; try: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info
