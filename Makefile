# The commands of this repository; `make help` lists them. Each makes its own virtual environment.

PYTHON ?= python3
VENV ?= .venv

# Taken unexpanded and passed through the environment, so that any text is safe in it.
DEMO_PROMPT := $(if $(filter command,$(origin PROMPT)),$(value PROMPT))
unexport PROMPT
export DEMO_PROMPT

# How long `make soak` takes.
SOAK_SECONDS ?= 3600

.PHONY: help demo demo-model test check soak judges browser clean

help:
	@echo 'make demo                 chat with a small model on this CPU'
	@echo 'make demo PROMPT="..."    answer once and leave'
	@echo 'make test                 install what the tests need and run them all'
	@echo 'make check                make test, and formatting, lint and types'
	@echo 'make soak                 load a server for an hour and watch its memory (SOAK_SECONDS=3600)'
	@echo 'make judges               let the clients and judges of others try a server'
	@echo 'make browser              chat in headless Chromium, also with the demo model (some minutes)'
	@echo 'make demo-model           only fetch the demo model into the cache'
	@echo 'make clean                remove the virtual environment (the model cache stays)'
	@echo 'PYTHON=python3.12 chooses the interpreter (3.10 or newer) of a new environment.'

demo: demo-model
	@if [ -n "$$DEMO_PROMPT" ]; then \
	  exec $(VENV)/bin/mlc_llm chat --prompt "$$DEMO_PROMPT"; \
	else \
	  exec $(VENV)/bin/mlc_llm chat; \
	fi

demo-model: $(VENV)/.installed
	@$(VENV)/bin/mlc_llm demo-model

test: $(VENV)/.installed-dev demo-model
	@PYTHON=$(VENV)/bin/python scripts/check test

check: $(VENV)/.installed-dev demo-model
	@PYTHON=$(VENV)/bin/python scripts/check

soak: $(VENV)/.installed-dev demo-model
	@$(VENV)/bin/python scripts/soak.py --seconds '$(SOAK_SECONDS)'

judges: $(VENV)/.installed-dev demo-model
	@$(VENV)/bin/python scripts/judges/run.py

browser: $(VENV)/.installed-dev demo-model
	@$(VENV)/bin/python -m pytest -ra -o python_files='test_*.py demo_in_browser.py' tests/browser

clean:
	rm -rf $(VENV)

# pip runs again only when pyproject.toml has changed.
$(VENV)/.installed: pyproject.toml
	@$(call install,.)
	@touch $@

$(VENV)/.installed-dev: pyproject.toml
	@$(call install,.[dev])
	@touch $@ $(VENV)/.installed

define install
echo "Installing mlc_llm and what it needs into $(VENV) ..." >&2 && \
$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else \
"mlc_llm needs Python 3.10 or newer, this is %d.%d: run make with PYTHON=python3.12, for example" \
% sys.version_info[:2])' && \
$(PYTHON) -m venv $(VENV) >&2 && \
$(VENV)/bin/python -m pip install --disable-pip-version-check --editable '$(1)' >&2
endef
