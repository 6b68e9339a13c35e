# `make lab` opens the notebooks, `make test` runs every test; each sets everything up first. `make help` lists all.
# Needed: make, Python 3.11 or newer, a network. Everything is installed into .venv and nowhere else.

VENV   := .venv
PYTHON := $(VENV)/bin/python
STAMP  := $(VENV)/.ready
TOUR   := notebooks/00_tour.ipynb

# uv installs. The one on the PATH if it runs (a shim may be there and yet fail), else one inside the environment.
UV := $(shell uv --version >/dev/null 2>&1 && echo uv || echo $(VENV)/bin/uv)

# TORCH=cpu (or cu128, ...) picks torch's build. The stamp remembers it; another choice begins a new environment.
CHOSEN := $(shell cat $(STAMP) 2>/dev/null)
TORCH  ?= $(CHOSEN)
ifneq ($(TORCH),$(CHOSEN))
  REDO := new-environment
endif

# The first Python that is new enough and really runs.
FIND_PYTHON = for p in python3.13 python3.12 python3.11 python3.14 python3 python; do \
	$$p -c 'import sys, venv; sys.version_info >= (3, 11) and print(sys.executable)' 2>/dev/null | grep . && break; done

# What a test run sees: the short training budget, and one thread for each of the two workers.
TEST_ENV  := LDM_EDU_BUDGET=check OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
NOTEBOOKS := $(if $(wildcard notebooks/*.ipynb),notebooks --ignore=notebooks/solutions)
NBVAL     := --nbval --nbval-current-env --nbval-sanitize-with tests/nbval.cfg \
             --nbval-cell-timeout 120 --nbval-kernel-startup-timeout 60

.PHONY: help setup lab test refresh lint lock new-environment
.DELETE_ON_ERROR:

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP)  ## the environment alone; TORCH=cpu for the small build of torch

# In this environment JupyterLab does not ask whether it may fetch news, which would cover a corner of the page, and
# long lines of code are wrapped, not cut.
LAB_FOLDER   := $(VENV)/share/jupyter/lab/settings/overrides.d
LAB_SETTINGS := {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false"}, \
                 "@jupyterlab/notebook-extension:tracker": {"codeCellConfig": {"lineWrap": true}}}

lab: setup  ## JupyterLab on the tour (ARGS="--no-browser --port=8890" and the like are passed on)
	@mkdir -p $(LAB_FOLDER) && echo '$(LAB_SETTINGS)' > $(LAB_FOLDER)/ldm-edu.json
	@# Waiting threads sleep soon: see ldm_edu/__init__.py, which comes too late where a notebook imports torch first.
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-20000} $(PYTHON) -m jupyterlab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" \
		$(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/$(TOUR) $(ARGS)

test: setup  ## unit tests, and every notebook against its stored outputs (ARGS="-k words" for some of them)
	$(TEST_ENV) $(PYTHON) -m pytest -n 2 --dist loadscope $(NBVAL) tests $(NOTEBOOKS) $(ARGS)

refresh: setup  ## run the notebooks and store their outputs (ARGS="notebooks/00_tour.ipynb" for one)
	$(PYTHON) tests/refresh_notebooks.py $(ARGS)

lint: setup  ## ruff
	$(PYTHON) -m ruff check .

lock: setup  ## resolve pyproject.toml again into requirements.lock (ARGS=--upgrade for newer versions)
	$(UV) pip compile --quiet --universal --all-extras --python-version 3.11 --custom-compile-command "make lock" \
		$(ARGS) pyproject.toml -o requirements.lock

$(STAMP): pyproject.toml requirements.lock $(REDO)
	@if [ -n "$(REDO)" ]; then rm -rf $(VENV); fi
	@if ! $(PYTHON) -c "" 2>/dev/null; then \
		rm -rf $(VENV); python=$$($(FIND_PYTHON)); \
		if [ "$(UV)" = uv ]; then uv venv --quiet --python "$${python:-3.13}" $(VENV); \
		elif [ -z "$$python" ]; then \
			echo "No Python 3.11 or newer was found. Install one (python.org, or your system's packages)." >&2; exit 1; \
		elif ! "$$python" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "$$python has no complete venv module. Debian, Ubuntu: sudo apt install python3-venv" >&2; exit 1; \
		fi; fi
	@$(UV) --version >/dev/null 2>&1 || $(PYTHON) -m pip install --quiet --disable-pip-version-check uv
	@# Compiled here, once: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every kernel would do it again.
	$(UV) pip install --compile-bytecode --python $(PYTHON) $(if $(TORCH),--torch-backend=$(TORCH)) \
		-c requirements.lock -e ".[test]"
	@# matplotlib lists the fonts once for each user, and says so; better here than in a notebook's output.
	@$(PYTHON) -c "import matplotlib.font_manager" 2>/dev/null
	@echo "$(TORCH)" > $@
