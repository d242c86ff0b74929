# Everything happens in $(VENV), which is set up once and brought up to date when a file it depends on changes.
# An editable install: a changed Python file needs no step, a changed kernel is compiled again by the next target.

PYTHON ?= python3
VENV ?= .venv
# On x86-64 Linux PyPI has these as CUDA builds, which bring gigabytes. pip prefers PyTorch's CPU builds where it sees them:
# `PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make demo`. Override both versions together.
TORCH ?= torch==2.13.0
TORCHVISION ?= torchvision==0.28.0
TIMM ?= timm==1.0.31
NETWORKS ?= alexnet vgg11 vgg16 googlenet inception_v3 resnet18 resnet50 squeezenet1_1 mobilenet_v2 efficientnet_b0 densenet121
# Batch x threads of each table.
SETTINGS ?= 1x1,1x2,8x1,8x2
BENCH_ARGS ?=
ZOO_ARGS ?=
# Tests run in so many processes, each with two threads (tests/conftest.py).
TEST_WORKERS ?= 2

BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
KERNEL_SOURCES := $(wildcard kernels/cpu/*) convselect/runtime/changes.cpp
CLANG_FORMAT_SOURCES := $(filter %.cpp %.h,$(KERNEL_SOURCES) $(wildcard tests/kernels/*))
SANITIZED := build/kernel_test/sanitized
PYTEST := $(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

.PHONY: demo test test-python tests-of-python check sanitize bench zoo lint format clean FORCE
.DELETE_ON_ERROR:

demo: $(STAMPS)/install $(STAMPS)/torchvision
	$(BIN)/convselect demo

test: lint $(STAMPS)/torchvision
	$(PYTEST)

# For daily work, under two minutes: every test, with one in fifty of its cases, but for those that build or run much.
check: lint $(STAMPS)/torchvision
	$(PYTEST) --one-in 50 -m 'not slow and not heavy'

# What depends on the Python, with another one: `make test-python PYTHON=python3.12`. Where PyPI has torch for it as a CUDA
# build only, that is gigabytes: before a release.
test-python:
	$(MAKE) VENV=.venv-$(notdir $(PYTHON)) tests-of-python

tests-of-python: $(STAMPS)/test
	$(PYTEST) $(patsubst %,tests/test_%.py,changes model_state shortcut shortcut_state weights ordinary_models concurrency)

# The programs, the operators and the fuzz with the library under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(STAMPS)/install $(STAMPS)/test
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake -G Ninja -S . -B $(SANITIZED) -DCONVSELECT_SANITIZE=ON
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZED)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
	  ASAN_OPTIONS=detect_leaks=0 CONVSELECT_SANITIZED=$(SANITIZED) \
	  $(PYTEST) $(patsubst %,tests/test_%.py,program slices operators between_convolutions verify verify_steps fuzz)

bench: $(STAMPS)/install $(STAMPS)/torchvision $(STAMPS)/peers
	$(BIN)/python benchmarks/run.py $(NETWORKS) --settings $(SETTINGS) $(BENCH_ARGS)

zoo: $(STAMPS)/install $(STAMPS)/torchvision $(STAMPS)/timm
	$(BIN)/python benchmarks/zoo.py $(ZOO_ARGS)

lint: $(STAMPS)/install $(STAMPS)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CLANG_FORMAT_SOURCES)

format: $(STAMPS)/test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CLANG_FORMAT_SOURCES)

clean:
	rm -rf .venv* build .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(STAMPS)/torch:
	$(PYTHON) -c 'import sys; sys.exit("convselect needs Python >= 3.10; set PYTHON=" if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	$(PIP) '$(TORCH)' numpy cmake ninja 'scikit-build-core>=0.11'
	touch $@

# torchvision's requirement on torch names another build of it, hence --no-deps.
$(STAMPS)/torchvision: $(STAMPS)/torch
	$(PIP) --no-deps '$(TORCHVISION)'
	$(PIP) pillow
	touch $@

$(STAMPS)/timm: $(STAMPS)/torch
	$(PIP) --no-deps '$(TIMM)'
	$(PIP) pyyaml huggingface_hub
	touch $@

# The names of the package's files: an editable install knows the modules it was made with.
$(STAMPS)/files: FORCE | $(STAMPS)/torch
	@find convselect kernels -type f -not -name '*.pyc' | LC_ALL=C sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(STAMPS)/install: $(STAMPS)/torch $(STAMPS)/files $(KERNEL_SOURCES) CMakeLists.txt pyproject.toml
	$(PIP) --no-build-isolation -e .
	touch $@

$(STAMPS)/test: pyproject.toml | $(STAMPS)/install
	$(PIP) --no-build-isolation -e '.[test]'
	touch $@

$(STAMPS)/peers: pyproject.toml | $(STAMPS)/install
	$(PIP) --no-build-isolation -e '.[peers,plots]'
	touch $@
