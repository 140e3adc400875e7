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
# The CUDA library takes minutes: it is built where it is asked for (make cuda, RNNFAST_CUDA=1) or where there is a card.
WITH_CUDA := $(or $(RNNFAST_CUDA),$(if $(wildcard /dev/nvidia0 /dev/dxg),,0))
NO_CUDA := $(filter 0,$(WITH_CUDA))
# One stamp for each: asking for the CUDA library after a build without it builds it.
BUILT   := $(VENV)/.built$(if $(NO_CUDA),,-cuda)
SOURCES := setup.py pyproject.toml $(shell find csrc -type f -not -path 'csrc/emulator/*' $(if $(NO_CUDA),-not '(' -path 'csrc/cuda/*' -not -path 'csrc/cuda/plan*' -not -name persistent.h ')'))
FORMAT  := $(shell find csrc tests/cpp tests/fuzz benchmarks/microbench benchmarks/occupancy -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: fuzz torch-versions triton-versions wheel-check help build libraries cuda sass card emulated kernel-test debug demo test test-exhaustive test-all test-gpu test-gpu-exhaustive lint format bench readme-figures wheel clean
.DELETE_ON_ERROR:

help:
	@echo 'make demo             train two models, each with torch.nn and with rnnfast side by side (4 minutes)'
	@echo 'make test             the tests; make test-exhaustive: the remaining grids; make test-all: both'
	@echo 'make kernel-test      one program of tests/cpp in the emulator: K=test_step CASE=lstm-float32 [SEED=7] [SAN=thread|address]'
	@echo 'make debug            gdb at the beginning of a kernel: K=test_step CASE=lstm-float32 [KERNEL=step_forward] [THREAD=5]'
	@echo 'make cuda             build the CUDA library (nvcc, no GPU needed); what its kernels take: build/cuda_resources.csv'
	@echo 'make cuda K=UNIT      compile one unit of it (step_lstm_bfloat16) and print what its kernels take'
	@echo 'make sass KERNEL=step_forward CELL=lstm TYPE=bfloat16 ARCH=9.0a   machine code, loops, instructions (COUNTS=1: tables, ALL=1)'
	@echo 'make card             all that a machine with a card needs, for compute capability 9.0 (nvcc, no GPU needed): build/card'
	@echo 'make test-gpu         the tests that need a CUDA device; make torch-versions: the built libraries with older torches'
	@echo 'make triton-versions  Triton 3.6.0 in build/, with which make test and test-exhaustive then compile the kernels, too'
	@echo 'make fuzz             random calls of the ops under ASan + UBSan and under TSan, FUZZ_SECONDS=600 each; it prints the seed'
	@echo 'make bench            time the layers against torch.nn (9 minutes); results in benchmarks/results/'
	@echo 'make readme-figures   the figures and tables of README, docs and examples anew from result files and cost model'
	@echo 'make lint | format    check | fix style; make wheel: dist/*.whl; make build: only set up; make clean'
	@echo 'TORCH=torch==2.13.0 chooses the torch, PYTHON=python3.12 the Python, RNNFAST_CUDA_ARCHS=8.6 what make cuda builds for'

$(PY):
	@echo 'make: an environment with $(PYTHON) in $(VENV)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo '$(PYTHON) is older than 3.10: set PYTHON='; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo 'No venv could be made. On Debian: apt-get install python3-venv'; exit 1; }

$(TORCHED): | $(PY)
	@echo 'make: $(TORCH) (a minute, or several where it comes with CUDA)'
	$(PY) -m pip install -q 'setuptools>=77' wheel ninja '$(TORCH)'
	@rm -f $(VENV)/.torch-*
	@touch '$@'

# The extension is built against the torch in .venv, and runs with every other one: a new torch needs no new build.
# First the libraries by themselves: pip would hide how far the compiler is.
$(BUILT): $(SOURCES) | $(TORCHED)
	@echo 'make: the C++ library$(if $(NO_CUDA), (the CUDA library: make cuda), and the CUDA library)'
	RNNFAST_CUDA='$(WITH_CUDA)' RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) setup.py -q build_ext --inplace
	@echo 'make: rnnfast in editable form, with what its tests and benchmarks need'
	RNNFAST_CUDA='$(WITH_CUDA)' RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) -m pip install -q --no-build-isolation -e '.[bench,dev]'
	@touch $@

# The order-only stamp above would not be looked at again once $(BUILT) exists, hence both here.
build: $(TORCHED) $(BUILT)

# The CUDA library too where nvcc is found.
libraries: build
	RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) setup.py -q build_ext --inplace

# What looks at single units must not build the whole library before: `build` does, after any change of a source.
SET_UP := $(if $(wildcard $(VENV)/.built*),,build)
cuda: $(if $(K),$(SET_UP),build)
ifdef K
	RNNFAST_CUDA=1 RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) benchmarks/cuda_resources.py --unit '$(K)' $(if $(BEFORE),--before '$(BEFORE)') $(if $(KEEP),--out '$(KEEP)')
else
	RNNFAST_CUDA=1 RNNFAST_CUDA_ARCHS='$(ARCHS)' $(PY) setup.py -q build_ext --inplace
	$(PY) benchmarks/cuda_resources.py
endif

sass: $(SET_UP)
	@$(PY) benchmarks/sass.py '$(KERNEL)' $(if $(ARCH),--arch '$(ARCH)') $(if $(CELL),--cell '$(CELL)') $(if $(TYPE),--type '$(TYPE)') $(if $(filter-out 0,$(ALL)),--all) $(if $(filter-out 0,$(COUNTS)),--counts)

# What goes to a machine with a card: the libraries, and programs that need neither torch nor Python there.
card: cuda
	$(PY) tests/build_card.py --quiet --archs $(CARD)
	$(PY) benchmarks/card_kit.py --archs '$(ARCHS)'

# The CUDA kernels for the host, and the C++ test programs.
emulated: $(TORCHED)
	$(PY) tests/build_emulated.py --quiet

# The shell shall not read names as patterns.
KERNEL_TEST = $(if $(K),'$(K)') $(foreach case,$(CASE),'$(case)')
# One program of tests/cpp, and of the kernels those that CASE is about. SITES=1 prints the synchronisations that are
# reached, SKIP=file:line leaves one out.
kernel-test: $(TORCHED)
	@$(PY) tests/kernel_test.py $(KERNEL_TEST) $(if $(SEED),--seed '$(SEED)') $(if $(SAN),--sanitizer '$(SAN)') \
		$(if $(SKIP),--skip '$(SKIP)') $(if $(filter-out 0,$(SITES)),--sites)

# The same, compiled for gdb, which stops where THREAD of BLOCK begins a kernel in whose name KERNEL is found.
debug: $(TORCHED)
	@$(PY) tests/kernel_test.py --debug $(KERNEL_TEST) $(if $(SEED),--seed '$(SEED)') $(if $(KERNEL),--kernel '$(KERNEL)') \
		$(if $(BLOCK),--block '$(BLOCK)') $(if $(THREAD),--thread '$(THREAD)') $(if $(SKIP),--skip '$(SKIP)')

demo: build
	$(PY) examples/train_charlm.py --out $(OUT)
	$(PY) examples/train_digits.py --out $(OUT)

# Two processes, whatever the machine: a test's own threads need room too.
test: build emulated
	$(PY) -m pytest -n 2 --dist worksteal

test-exhaustive: build emulated
	$(PY) -m pytest -n 2 --dist worksteal -m 'exhaustive and not gpu'

test-all: test test-exhaustive

# Random calls under sanitizers, or under SAN=address or thread alone; builds the C++ library for each (5 minutes).
fuzz: build
	$(PY) tests/fuzz/run.py --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED)) $(if $(SAN),--sanitizer '$(SAN)')

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

# The pages' figures and tables, from the result files and the plan's cost model alone.
readme-figures: build
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/plan_map.py
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

torch-versions: libraries $(OLDER:%=build/torch-%/.made)
	$(PY) tests/torch_versions.py $(OLDER)

# The oldest Triton of pyproject.toml, beside the installed one: where it is, the tests compile the kernels with both.
OLDER_TRITON := 3.6.0
build/triton-%/.made: | $(PY)
	@rm -rf build/triton-$*
	$(PY) -m pip install -q --no-deps --no-compile --target build/triton-$* 'triton==$*'
	@touch $@

triton-versions: $(OLDER_TRITON:%=build/triton-%/.made)

clean:
	rm -rf build dist out rnnfast.egg-info rnnfast/*.so .pytest_cache .ruff_cache .mypy_cache $(VENV)/.built*
