# The two commands of the README are `make demo` and `make test`; both set up .venv and build first.
# TORCH is what pip installs as torch: `make test TORCH=torch==2.13.0` takes that version (a CPU build where the index has one).
TORCH  ?= torch
PYTHON ?= python3
VENV   ?= .venv
OUT    ?= out
# CUDA code of a development build: two generations compile in a third of the time that setup.py's whole list takes, which
# is what `make wheel` and pip build. `make cuda RNNFAST_CUDA_ARCHS=8.6` changes what is built here.
ARCHS  := $(or $(RNNFAST_CUDA_ARCHS),8.0;9.0a)
# What the programs of `make card` are built for: the card where they are to run. ARCHS must have it.
CARD   ?= 9.0a
# How long `make fuzz` calls the ops under each of its two sanitizers.
FUZZ_SECONDS ?= 600
export PIP_DISABLE_PIP_VERSION_CHECK = 1

PY      := $(VENV)/bin/python
# One stamp per requirement: asking for another torch makes a new stamp and removes the old one.
TORCHED := $(VENV)/.torch-$(subst /,_,$(TORCH))
BUILT   := $(VENV)/.built
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -path 'csrc/emulator/*')
FORMAT  := $(shell find csrc tests/cpp tests/fuzz benchmarks/microbench -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: fuzz torch-versions wheel-check help build cuda card emulated demo test test-exhaustive test-all test-gpu test-gpu-exhaustive lint format bench readme-figures wheel clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo             train two models, each with torch.nn and with rnnfast side by side (4 minutes)'
	@echo 'make test             the tests; make test-exhaustive: the remaining grids; make test-all: both'
	@echo 'make cuda             build the CUDA library (nvcc, no GPU needed); what its kernels take: build/cuda_resources.csv'
	@echo 'make card             all that a machine with a card needs, for compute capability 9.0 (nvcc, no GPU needed): build/card'
	@echo 'make test-gpu         the tests that need a CUDA device; make torch-versions: the built libraries with older torches'
	@echo 'make fuzz             random calls of the ops under ASan + UBSan and under TSan, FUZZ_SECONDS=600 each; it prints the seed'
	@echo 'make bench            time the layers against torch.nn (9 minutes); results in benchmarks/results/'
	@echo 'make readme-figures   the figures and tables of README, docs and examples anew from the result files'
	@echo 'make lint | format    check | fix style; make wheel: dist/*.whl; make build: only set up; make clean'
	@echo 'TORCH=torch==2.13.0 chooses the torch, PYTHON=python3.12 the Python, RNNFAST_CUDA_ARCHS=8.6 what make cuda builds for'

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo '$(PYTHON) is older than 3.10: set PYTHON='; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'No venv could be made. On Debian: apt-get install python3-venv'; exit 1; }

$(TORCHED): | $(PY)
	$(PY) -m pip install -q 'setuptools>=77' wheel ninja '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch '$@'

# The extension is built against the torch in .venv, and runs with every other one: a new torch needs no new build.
$(BUILT): $(SOURCES) | $(TORCHED)
	RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) -m pip install -q --no-build-isolation -e '.[bench,dev]'
	@touch $@

# The order-only stamp above would not be looked at again once $(BUILT) exists, hence both here.
build: $(TORCHED) $(BUILT)

cuda: build
	RNNFAST_CUDA=1 RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) setup.py -q build_ext --inplace
	$(PY) benchmarks/cuda_resources.py

# What goes to a machine with a card: the libraries, and programs that need neither torch nor Python there.
card: cuda
	$(PY) tests/build_card.py --quiet --archs $(CARD)
	$(PY) benchmarks/card_kit.py --archs '$(ARCHS)'

# The CUDA kernels for the host, and the C++ test programs.
emulated: build
	$(PY) tests/build_emulated.py --quiet

demo: build
	$(PY) examples/train_charlm.py --out $(OUT)
	$(PY) examples/train_digits.py --out $(OUT)

# Two processes, whatever the machine: a test's own threads need room too.
test: emulated
	$(PY) -m pytest -n 2 --dist worksteal

test-exhaustive: emulated
	$(PY) -m pytest -n 2 --dist worksteal -m 'exhaustive and not gpu'

test-all: test test-exhaustive

# Random calls under sanitizers; builds the C++ library for each (2 minutes).
fuzz: build
	$(PY) tests/fuzz/run.py --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED))

# On a card. What takes most of its memory runs by itself.
test-gpu: build
	@$(PY) -c 'import sys; from rnnfast import libraries; why = libraries.cuda_problem(); sys.exit(why and "make test-gpu: " + why)'
	$(PY) -m pytest -n 4 --dist worksteal -m 'gpu and not exhaustive and not alone'
	$(PY) -m pytest -m 'gpu and not exhaustive and alone'

# Beside that the whole grids, minutes long.
test-gpu-exhaustive: build
	$(PY) -m pytest -n 4 --dist worksteal -m 'gpu and exhaustive'

lint: build
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(if $(FORMAT),$(VENV)/bin/clang-format --dry-run -Werror $(FORMAT))

format: build
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(if $(FORMAT),$(VENV)/bin/clang-format -i $(FORMAT))

bench: build
	$(PY) benchmarks/run.py --suite sizes,one-step,packed,lengths,models --seconds 1.5 --patience 120
	$(PY) benchmarks/plot.py

# The pages' figures and tables, from the result files alone.
readme-figures: build
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/readme.py

wheel: build
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

# The wheel in an environment of its own, with any torch: make wheel-check TORCH=torch
wheel-check: wheel
	rm -rf build/wheel-check
	$(PYTHON) -m venv build/wheel-check
	build/wheel-check/bin/python -m pip install -q numpy '$(TORCH)'
	build/wheel-check/bin/python -m pip install -q --no-deps dist/rnnfast-*.whl
	cd build && wheel-check/bin/python ../tests/smoke.py

# The torches beside the installed one with which the libraries are tried: the oldest that the README promises, and the next.
# Without what they depend on, which takes a minute and gigabytes each: tests/torch_versions.py does without.
OLDER := 2.10.0 2.11.0
build/torch-%/.made: | $(PY)
	@rm -rf build/torch-$*
	$(PY) -m pip install -q --no-deps --no-compile --target build/torch-$* 'torch==$*'
	@touch $@

torch-versions: build $(OLDER:%=build/torch-%/.made)
	$(PY) tests/torch_versions.py $(OLDER)

clean:
	rm -rf build dist out rnnfast.egg-info rnnfast/*.so .pytest_cache .ruff_cache .mypy_cache $(BUILT)
