# Everything happens in .venv; PYTHON names the interpreter that makes it (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup demo test lint bench clean

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) torch torchvision setuptools wheel
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/mekd run --config configs/digits.yaml

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mekd

bench: setup
	$(BIN)/python -m bench limits

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
