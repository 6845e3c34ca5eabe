# Everything runs in an environment of its own, .venv; the two commands below set it up by themselves.
#
#   make demo    install, then run examples/quickstart.py
#   make test    install, then run the whole test suite
#
# TORCH chooses the torch requirement, for example: make test TORCH=torch==2.6.0

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/examples
	$(BIN)/python examples/quickstart.py

test: $(VENV)/test
	$(BIN)/python -m pytest -n auto

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch goes first: anything else that asks for it then finds the one that was chosen.
$(VENV)/examples $(VENV)/test $(VENV)/dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --editable ".[$(@F)]" "$(TORCH)"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
