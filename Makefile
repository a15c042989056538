# Two commands: `make report` and `make test`. Each sets up what it needs from nothing and skips what is already there.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready
INSTALL := $(BIN)/pip install -q --disable-pip-version-check -c constraints.txt

.PHONY: report test examples check format lint types docs setup clean

report: setup
	$(BIN)/bilevel compare hypercleaning fewshot --out report

test: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal

# All example scripts, small. A part of `make test` and `make check`.
examples: setup
	$(BIN)/python -m pytest -q -n auto --dist worksteal tests/test_examples.py

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --dist worksteal
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -b html docs docs/_build/html

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q -j auto -b html docs docs/_build/html
	@echo docs/_build/html/index.html

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (torch and what the report, the tests and the docs need); a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(INSTALL) -e ".[all]"
	@$(call peer,betty-ml,--no-deps --ignore-requires-python)
	@$(call peer,higher)
	@$(call peer,torchopt)
	@touch $(READY)

# Other libraries, for the baselines and the pages "Coming from ...". betty-ml declares Python < 3.11 and runs on 3.11.
peer = $(INSTALL) --only-binary :all: $(2) $(1) 2>$(VENV)/.peer || \
	echo "no $(1) here, its tests will skip: $$(grep -m 1 ^ERROR $(VENV)/.peer)"

clean:
	rm -rf $(VENV) report docs/_build
