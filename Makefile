# make demo     set up .venv if it is missing, then run the demonstration (no network, minutes on two cores)
# make demo-vision   train and prune a small ResNet on scikit-learn's digits (no network, under a minute)
# make test     set up .venv if it is missing, then run every test, the slow ones included, on two processes
# make test-fast     the same without the slow tests
# make coverage      every test, then the lines and branches of the package that none has reached
# make test-lowest   every test with the oldest versions that pyproject.toml admits, in .venv-lowest
# make lint     check format, lint, types and imports         make format   rewrite the files in place
# make docs     build the documentation site into outputs/site; every warning is an error (no network)
# make notebooks     write four pages of the documentation as notebooks into outputs/notebooks
# make clean    remove build products and caches; environments and outputs/ stay
#
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3

# Relative paths only: a checkout whose path holds spaces would split an absolute one into several targets.
VENV := .venv
CONSTRAINTS := constraints.txt
RUN := $(VENV)/bin/python
INSTALL := $(RUN) -m pip install --quiet --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable
READY := $(VENV)/.mfac-ready
DEV_READY := $(VENV)/.mfac-dev-ready
DOCS_READY := $(VENV)/.mfac-docs-ready
CHECK_VERSION := import sys; sys.exit(sys.version_info < (3, 10) and "mfac_hf needs Python 3.10 or newer, this is \
	%s: try make PYTHON=python3.12" % sys.version.split()[0])

.PHONY: demo demo-vision test test-fast coverage test-lowest lint format docs notebooks clean
.DEFAULT_GOAL := test

demo: $(READY)
	$(RUN) scripts/demo.py

# SGD, because it learns digits in seconds; pruned once by magnitude and once by M-FAC, without training afterwards.
VISION := --model resnet20 --progress false
PRUNE_DIGITS := scripts/prune_vision.py $(VISION) --checkpoint outputs/demo-vision/dense.pth --nepochs 0 \
	--sparsities .5 .7 .8 .9 --prun_batchsize 4 --nrecomps 1 --blocksize 64
demo-vision: $(READY)
	$(RUN) scripts/train_vision.py $(VISION) --optim sgd --nepochs 4 --batchsize 64 --save outputs/demo-vision/dense.pth
	$(RUN) $(PRUNE_DIGITS) --pruner mag --prefix outputs/demo-vision/magnitude
	$(RUN) $(PRUNE_DIGITS) --pruner mfac --prefix outputs/demo-vision/mfac

# make test WORKERS=0 runs all in one process, WORKERS=8 on more cores.
WORKERS ?= 2
PYTEST := $(RUN) -m pytest --numprocesses $(WORKERS) --dist worksteal
test: $(READY)
	$(PYTEST)

test-fast: $(READY)
	$(PYTEST) -m "not slow"

coverage: $(DEV_READY)
	$(PYTEST) --cov --cov-report=term-missing:skip-covered

test-lowest:
	@$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

lint: $(DEV_READY)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

format: $(DEV_READY)
	$(RUN) -m ruff format .
	$(RUN) -m ruff check --fix .

# The variable silences an advertisement of MkDocs' theme. Not --quiet: it hides warnings from strict, too.
docs: $(DOCS_READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build

notebooks: $(READY)
	$(RUN) scripts/make_notebooks.py

# One install, under the constraints: pip would follow a bare `torch` to its newest release and gigabytes of CUDA.
# An interrupted or restricted `venv` leaves an environment without pip behind; creating it again repairs it.
$(READY): pyproject.toml $(CONSTRAINTS)
	@if ! { test -x $(RUN) && $(RUN) -c 'import pip' 2>/dev/null; }; then \
		"$(PYTHON)" -c '$(CHECK_VERSION)' && \
		echo "Creating $(VENV)" && "$(PYTHON)" -m venv $(VENV); \
	fi
	@echo "Installing mfac_hf and what it needs into $(VENV) (some minutes the first time)"
	@$(INSTALL) ".[test,plots]"
	@touch $@

$(DEV_READY): $(READY)
	@echo "Adding the tools for development to $(VENV)"
	@$(INSTALL) ".[dev]"
	@touch $@

$(DOCS_READY): $(READY)
	@echo "Adding the tools for documentation to $(VENV)"
	@$(INSTALL) ".[docs]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path './.venv*' -prune -o -type d -name __pycache__ -exec rm -rf {} +
