# Two commands do it: `make run` and `make test`. Both set up .venv on their first call.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
# The conda environment of environment.yml where that is active, else one of our own.
VENV ?= $(if $(filter seven-llm-speedups,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX),.venv)
PY := $(VENV)/bin/python
READY := $(VENV)/ready-$(EXTRA)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.PHONY: run deeper test test-slow lint reference gpu-check bench soak audit coverage readme html schema publish constraints clean clean-cache

run: $(READY)
	$(PY) -m helpers.series.run $(if $(AGAIN),--again)

deeper: $(READY)
	$(PY) -m helpers.series.run --deeper $(if $(AGAIN),--again)

test: $(READY) lint
	$(PY) -m pytest -m "not slow"

test-slow: $(READY)
	$(PY) -m pytest -m slow

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check helpers tests
	$(PY) -m mypy
	$(PY) -m codespell_lib

reference: $(READY)
	$(PY) -m helpers.series.run --deeper --reference
	$(PY) -m helpers.series.run --reference
	$(PY) -m helpers.series.report

# Sets nothing up, so that it runs on a bare machine with a card and torch: .venv where there is one.
gpu-check:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) -m tests.bench.gpu $(if $(SECONDS),--seconds $(SECONDS))

bench: $(READY)
	status=0; for part in measuring engines serving perplexity; do $(PY) -m tests.bench.$$part || status=1; done; exit $$status

soak: $(READY)
	$(PY) -m tests.bench.soak $(if $(PARTS),--parts $(PARTS))

# Known weaknesses of what is pinned. Needs the network; nothing else of the project waits for it.
audit: $(READY)
	$(PY) -m tests.bench.audit

# How much of the kit the unit tests run, by lines
coverage: $(READY)
	$(PY) -m coverage run --source=helpers -m pytest -m "not slow and not notebook"
	$(PY) -m coverage report --include="helpers/*.py" --fail-under=90

readme: $(READY)
	$(PY) -m helpers.series.report

# build/html: README, its pages and every notebook, for a phone or any other browser
html: $(READY)
	$(PY) -m helpers.series.pages

schema: $(READY)
	$(PY) -c "from helpers import results; print(results.json_schema(), end='')" > helpers/data/results.schema.json

# make publish URL=https://HOST/OWNER/NAME writes the address and this commit wherever they stand
publish:
	$(PYTHON) -m helpers.series.publish "$(URL)"

clean:
	rm -rf .venv runs build *.egg-info .mypy_cache .pytest_cache .ruff_cache

# What was made outside of this folder: the converted default model, and shapes with random weights.
clean-cache:
	rm -rf "$${XDG_CACHE_HOME:-$$HOME/.cache}/seven-llm-speedups"

# Made again for another EXTRA (a card was put in or taken out), and where the Python of an old one is gone.
$(READY): pyproject.toml constraints-$(EXTRA).txt $(shell test -x $(PY) || echo FORCE)
	@$(PYTHON) helpers/series/setup_venv.py --venv $(VENV) --extra $(EXTRA) --torch-index $(TORCH_INDEX)
	@touch $@

FORCE:

# The versions pinned today are kept where they fit; NEWEST=1 forgets them. Some twelve minutes.
constraints:
	$(PYTHON) -m tests.resolution all $(if $(NEWEST),--newest)
