# Every command a developer types. Needs Python >= 3.11 and make.
PYTHON ?= python3
VENV ?= .venv
PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check install --quiet
export BENTOML_DO_NOT_TRACK ?= True
ifndef BENTOML_HOME
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export BENTOML_HOME := $(CURDIR)/$(VENV)/bentoml# BentoML does not start without a folder that it can write
endif
endif

.PHONY: help serve bento test test-service lint format cluster gpu-check docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/'

serve: $(VENV)/.installed  ## install, train the default ensemble if there is none, and serve
	@test -n "$$($(PY) -m models_store list --quiet)" || $(PY) -m training.fge --dataset digits --network preresnet8 \
		--epochs 80 --batch-size 64 --name digits-fge
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" exec $(VENV)/bin/bentoml serve

bento: $(VENV)/.installed  ## NAME=…: the service with one published ensemble, to be served anywhere
	@$(PY) -m deploy.bento $(if $(NAME),$(NAME),$(error make bento NAME=…: which ensemble? python -m models_store list))

# The service's tests run once, where torch is not installed; here those that need more, and the service as a whole.
# A thread a process: those of several processes on the same cores would wait for each other at every step.
test: lint test-service  ## everything that must hold
	$(PY) -m pytest tests/test_architecture.py tests/test_docs.py tests/models_store/inputs/test_decoding.py tests/models_store/graphs tests/models_store/decisions \
		tests/service/test_app.py tests/service/test_bad_input.py
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/training tests/benchmarks tests/modepath --numprocesses=auto --maxprocesses=8 --dist=worksteal

# The client libraries of gRPC and of Triton bring threads and fork handlers, so their tests have a process of their own.
test-service: $(VENV)-service/.installed  ## the service and the store where torch is not installed
	$(VENV)-service/bin/python -m pytest tests/service tests/models_store tests/deploy tests/modepath tests/test_corpora.py --ignore=tests/service/oip
	$(VENV)-service/bin/python -m pytest tests/service/oip

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/basedpyright

format: $(VENV)/.installed-dev  ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

cluster: $(VENV)/.installed  ## several Ray nodes in network namespaces of this machine (root); stop them: python -m deploy.ray_cluster down
	$(PIP) -e ".[ray]"
	$(PY) -m deploy.ray_cluster up

gpu-check:  ## everything that needs a GPU, in pieces of at most 8 minutes; exit code 3 without a GPU
	@if [ -x $(PY) ]; then $(PY) -m benchmarks.gpu.check; else $(PYTHON) -m benchmarks.gpu.check; fi

docs: $(VENV)/.installed-docs  ## the documentation site, into site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

clean:  ## remove the environments; published ensembles and runs stay
	rm -rf $(VENV) $(VENV)-service $(VENV)-triton $(VENV)-mlserver

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "installing (a few minutes, once)"
	$(PIP) -e '.[service,training]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) -e '.[service,training,dev]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)-service/.installed: pyproject.toml Makefile
	test -x $(VENV)-service/bin/python || $(PYTHON) -m venv $(VENV)-service
	$(PIP:$(PY)%=$(VENV)-service/bin/python%) -e '.[service,client,grpc,postgres,remote,signing,texts,tracing]' 'moto[server]' pytest pytest-timeout hypothesis jsonschema kubernetes-validate playwright axe-playwright-python 'tritonclient[grpc,http]'
	@touch $@

# A real Triton, and MLServer, to compare with. Triton's wheel needs the Python 3.11.2 of Debian.
$(VENV)-triton/.installed:
	/usr/bin/python3 -m venv $(VENV)-triton
	$(PIP:$(PY)%=$(VENV)-triton/bin/python%) nvidia-pytriton onnxruntime numpy
	@touch $@

$(VENV)-mlserver/.installed:
	$(PYTHON) -m venv $(VENV)-mlserver
	$(PIP:$(PY)%=$(VENV)-mlserver/bin/python%) mlserver onnxruntime numpy
	@touch $@
