# Everything runs in an environment of its own (.venv), made on first use and reused until pyproject.toml changes.
#   make test PYTHON=python3.12      the interpreter a new environment is made with
#   make test WORKERS=4              more test processes, on more cores

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
TEST_TIMEOUT ?= 900
MIN_COVERAGE ?= 95
PYTEST_ARGS ?=
DEMO_ARGS ?=
# Of make gpu
BUDGET ?= 480
OUT ?= runs/gpu
DATA ?=
STAGES ?= tests,bench,cifar,fit
PROCESSES ?= 12

BIN := $(VENV)/bin
# One thread for each worker: two workers with all cores each would only wait for one another.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
# The packages that must be covered, each for itself, lines and branches together.
COVERED := functional nn

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-training test-processors lint format docs gpu clean distclean FORCE

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-lab ## train network deconvolution and batch normalisation side by side on real digits
	$(BIN)/netdeconv demo $(DEMO_ARGS)

test: $(VENV)/.installed-dev ## run every test and hold the coverage of functional/ and nn/
	@rm -f .coverage .coverage.*
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout $(TEST_TIMEOUT) \
		--durations 10 --cov=netdeconv --cov-report= $(PYTEST_ARGS)
	@set -e; for package in $(COVERED); do \
		echo "coverage of src/netdeconv/$$package (at least $(MIN_COVERAGE) %):"; \
		$(BIN)/python -m coverage report --include="src/netdeconv/$$package/*" --fail-under=$(MIN_COVERAGE); \
	done

test-training: $(VENV)/.installed-dev ## run the tests of training alone
	$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout $(TEST_TIMEOUT) -m training $(PYTEST_ARGS)

test-processors: $(VENV)/.installed-dev ## run the tests of training as on other processors, with other seeds and inputs
	$(BIN)/python tools/try_processors.py --workers $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev ## sort imports and mend what ruff can mend
	$(BIN)/ruff check --fix .

# The variable silences the theme's advertisement of its successor.
docs: $(VENV)/.installed-docs ## build the documentation into site/, every warning an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

# Not in .venv: a machine with a GPU is often a bare one, which has torch and no network; see tools/gpu_run.py.
gpu: ## on a machine with a GPU: tests, benchmarks, trainings within BUDGET seconds (OUT=DIR DATA=DIR STAGES=tests,bench,cifar,fit)
	$(PYTHON) tools/gpu_run.py --budget $(BUDGET) --out $(OUT) --stages $(STAGES) --processes $(PROCESSES) $(if $(DATA),--data $(DATA))

clean: ## remove caches, coverage and build artefacts (runs/ and .venv stay)
	rm -rf build dist site htmlcov .coverage .coverage.* .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and remove the environment too
	rm -rf $(VENV)

# A stamp is younger than pyproject.toml exactly when its extra is installed as pyproject.toml says.
# dev contains lab, so a finished dev install stamps both.
$(VENV)/.installed-dev: pyproject.toml $(VENV)/.created
	@echo "Installing netdeconv[dev] into $(VENV) (PyTorch is large: minutes on first use, nothing later) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.installed-lab $@

$(VENV)/.installed-lab: pyproject.toml $(VENV)/.created
	@echo "Installing netdeconv[lab] into $(VENV) (PyTorch is large: minutes on first use, nothing later) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[lab]'
	@touch $@

$(VENV)/.installed-docs: pyproject.toml $(VENV)/.created
	@echo "Installing netdeconv[docs] into $(VENV) (PyTorch is large: minutes on first use, nothing later) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	@touch $@

# An environment is bound to its folder (scripts and the editable install name it) and to its interpreter:
# one that was copied along with the folder, or whose interpreter is gone, is made anew.
ifneq ($(CURDIR) $(wildcard $(BIN)/python),$(shell cat $(VENV)/.created 2>/dev/null) $(BIN)/python)
$(VENV)/.created: FORCE
endif

# An environment made by hand is used as it is.
$(VENV)/.created:
	@if [ ! -e $@ ] && $(BIN)/python -m pip --version >/dev/null 2>&1; then echo "Using the environment in $(VENV)."; else \
		command -v "$(PYTHON)" >/dev/null || { echo "error: found no '$(PYTHON)'." \
			"Install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "error: netdeconv needs Python 3.10" \
			"or newer; '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1 | head -n 1). Name another: make PYTHON=/path/to/python3" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: '$(PYTHON)' cannot make environments." \
			"Install its venv module (on Debian and Ubuntu the package python3-venv)." >&2; exit 1; }; \
		echo "Creating $(VENV) with $$("$(PYTHON)" --version) ..."; \
		"$(PYTHON)" -m venv --clear $(VENV) || exit 1; \
	fi
	@printf '%s\n' "$(CURDIR)" > $@
