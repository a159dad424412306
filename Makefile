# Everything sets itself up: .venv is made when it is missing or the pins have changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

SECONDS ?= 600

.PHONY: help spice test test-slow test-faults fuzz audit lint prose docs clean

help:
	@echo "make spice      train So3krates on SPICE, or on generated data, into runs/spice, with a report"
	@echo "                (without training, use the force field of the package: docs/force_field.md)"
	@echo "make test       run the fast tests (test-slow: those that take minutes)"
	@echo "make test-faults  check that the tests catch known faults (tests/faults)"
	@echo "make fuzz       read corrupted files of every format for SECONDS=600 each"
	@echo "make audit      compare the installed packages with known vulnerabilities"
	@echo "make lint       check the style"
	@echo "make prose      count words and names that make code hard to read"
	@echo "make docs       build the documentation into site/"

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), f'Python 3.11 or newer is needed, this is {sys.version}'"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,dev]'
	touch $@

spice: $(VENV)/.ready
	$(BIN)/python -m mlip_jax.main --config=configs/spice.py --workdir=runs/spice

# Both processes and their children import the same modules: bytecode is written also where the environment forbids it.
test: $(VENV)/.ready
	env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(VENV)/.ready
	MLIP_JAX_TEST_COMPILATION=optimized $(BIN)/python -m pytest -m slow

test-faults: $(VENV)/.ready
	$(BIN)/python tests/faults/run.py --jobs 2

fuzz: $(VENV)/.ready
	$(BIN)/python tests/hostile/fuzz.py --seconds $(SECONDS)

audit: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/python -m pip_audit --skip-editable

lint: $(VENV)/.ready
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m ruff check .

prose: $(VENV)/.ready
	$(BIN)/python tests/prose.py

docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:
	rm -rf $(VENV)
