# Each target works on a fresh machine: `setup` first makes .venv, a real ComfyUI in .host, and a browser.
PYTHON ?= python3
VENV_PYTHON = .venv/bin/python
MODELS ?=
HOST ?=

.PHONY: setup demo test bench lint

setup:
	@$(PYTHON) -m tools.setup.install $(if $(HOST),--host "$(HOST)")

demo: setup
	@MODELS="$(MODELS)" $(VENV_PYTHON) -m tools.demo.run

test: setup
	@HOST="$(HOST)" $(or $(COMFYUI_PYTHON),$(if $(HOST),$(PYTHON),$(VENV_PYTHON))) tools/setup/run_tests.py

bench: setup
	@$(VENV_PYTHON) -m benchmarks

lint: setup
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m pyright
	@.venv/bin/lint-imports --no-cache
