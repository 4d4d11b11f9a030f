# The README's commands. Everything is installed into .venv; system packages only where missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Paths to the checkout only: what is imported must be what was installed.
export PYTHONPATH =

.PHONY: demo demo-qemu test lint check soak break-invariants bench bench-board clean

demo: $(VENV)/demo.installed
	$(BIN)/stillframe demo

demo-qemu: $(VENV)/demo-qemu.installed
	$(BIN)/python -m demo.linux_guest

test: $(VENV)/test.installed
	$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m mypy.stubtest stillframe.capture._capture stillframe.image._fill stillframe.board.memory._guest_memory --allowlist tests/stubtest_allowlist.txt

check: lint test

soak: $(VENV)/test.installed
	$(BIN)/python -m pytest -m soak -s tests/soak $(PYTEST_ARGUMENTS)
	$(BIN)/python -m tests.soak.fuzz_stream --seconds 600

break-invariants: $(VENV)/test.installed
	$(BIN)/python -m pip install --quiet cython
	$(BIN)/python tools/break_invariants.py

bench: $(VENV)/demo-qemu.installed
	$(BIN)/python -m bench.compare $(BENCH_ARGUMENTS)

bench-board: $(VENV)/demo.installed
	$(BIN)/python -m bench.board --ram 256,2048 $(BENCH_ARGUMENTS)

SOURCES = pyproject.toml CMakeLists.txt $(shell find src -name '*.py' -o -name '*.pyx' -o -name '*.[chS]' -o -name 'board.*')

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/demo.installed: $(SOURCES)
	PYTHON=$(PYTHON) tools/install-system-packages.sh demo
	$(MAKE) $(BIN)/python
	$(BIN)/python -m pip install --quiet '.[board]'
	touch $@

$(VENV)/demo-qemu.installed: $(VENV)/demo.installed
	PYTHON=$(PYTHON) tools/install-system-packages.sh demo-qemu
	touch $@

$(VENV)/test.installed: $(SOURCES)
	PYTHON=$(PYTHON) tools/install-system-packages.sh test
	$(MAKE) $(BIN)/python
	$(BIN)/python -m pip install --quiet --group test --group lint '.[board]'
	touch $@ $(VENV)/demo.installed $(VENV)/demo-qemu.installed

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
