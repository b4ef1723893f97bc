# make demo      train networks on real images with fused activations; tables and pictures
# make check     lint, types, and every row on every path that runs here, in a minute and a half
# make test      the same and every test once, both compilers and the interpreter, in minutes
# make test-all  all that is left: sweeps, models, broken installs, distributed, architectures
# make gpu       where a GPU and torch are: tests, comparisons and pictures, into RESULTS=folder
# make sanitize  likewise: every kernel under compute-sanitizer
# make mutate    seed bugs and see that the tests catch each; writes tests/mutations.md
# make bench     the comparisons and their pictures, on whatever is here

SHELL := /bin/bash
PYTHON ?= python3
RESULTS ?= benchmarks/results/gpu
VENV := .venv
RUN := $(VENV)/bin/python
TIMM_VENV := .venv-timm
RUN_TIMM := $(TIMM_VENV)/bin/python
# A release by number: torch without one may be newer than what was tested.
TORCH ?= torch==2.13.0
# Its release that goes with that torch. There is no build of it for a CPU.
TORCHVISION ?= torchvision==0.28.0
# The instruction counts are gated on this compiler; others run for correctness.
TRITON ?= triton==3.7.1
# The oldest that is supported: everything compiles with it, too.
TRITON_OLDEST ?= triton==3.6.0
CSRC := $(wildcard csrc/*.* csrc/host/*)
# In place, for this torch; without nvcc the host extension alone.
EXTENSIONS := $(VENV)/extensions
# What takes long and matters most comes first, and the pictures last. The command `instructions` is
# run by hand: it takes minutes to compile, and says the same everywhere.
COMPARISONS := speed accuracy compile memory overhead training plot activations
# `make gpu` takes minutes, and small networks on small images do not need a GPU.
GPU_COMPARISONS := $(filter-out training,$(COMPARISONS))
# On as many cores as there are, up to four: each process imports torch and what goes with it.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
TESTS := -m pytest $(PARALLEL) --durations 10
# Once more without the host extension: what depends on how a call gets to the kernels.
IN_PYTHON := --without-host-extension $(addprefix tests/test_,$(addsuffix .py,autograd compile \
	compiled_derivatives concurrency distributed export faults kernels rematerialization))

.PHONY: demo check test test-all mutate gpu sanitize lint types bench clean smoke smoke-interpreted

demo: $(VENV)/demo
	$(RUN) -m benchmarks demo

# Each tier ends with one line that says what happened. A marker puts a test into its tier, see
# tests/conftest.py. With TRITON_INTERPRET=1 only those run that run the Triton kernels.
check: $(VENV)/test
	@if $(MAKE) --no-print-directory -k -j 2 --output-sync=target lint types smoke smoke-interpreted; \
	then echo "make check: lint, types and every row on every path that runs here passed"; \
	else echo "make check: FAILED, see above"; exit 1; fi

smoke smoke-interpreted: $(VENV)/test
	TRITON_INTERPRET=$(if $(findstring -,$@),1,0) $(RUN) -m pytest -q -m smoke

test: $(VENV)/test $(EXTENSIONS)
	@status=0; \
	$(MAKE) --no-print-directory lint types || status=1; \
	$(RUN) $(TESTS) -m "not full" || status=1; \
	TRITON_INTERPRET=1 $(RUN) $(TESTS) -m "not full" || status=1; \
	TRITON_INTERPRET=1 $(RUN) $(TESTS) -m "not full" $(IN_PYTHON) || status=1; \
	if [ $$status = 0 ]; then echo "make test: every row on every path passed"; \
	else echo "make test: FAILED, see above"; fi; exit $$status

test-all: $(VENV)/test $(VENV)/triton-oldest $(TIMM_VENV)/test $(EXTENSIONS)
	@status=0; \
	$(RUN) $(TESTS) -m full || status=1; \
	TRITON_INTERPRET=1 $(RUN) $(TESTS) -m full || status=1; \
	TRITON_INTERPRET=1 $(RUN) $(TESTS) -m full $(IN_PYTHON) || status=1; \
	PYTHONPATH=$(VENV)/triton-oldest $(RUN) -m pytest tests/test_machine_code.py -k compiles || status=1; \
	PYTHONPATH=$(VENV)/triton-oldest $(RUN) -m pytest tests/test_triton_launch.py || status=1; \
	$(RUN_TIMM) -m pytest -m timm tests || status=1; \
	if [ $$status = 0 ]; then echo "make test-all: all that make test leaves out passed"; \
	else echo "make test-all: FAILED, see above"; fi; exit $$status

mutate: $(VENV)/test $(EXTENSIONS)
	$(RUN) -m tests.mutations

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CSRC) tests/shared/host/* tests/shared/cpu/*

types: $(VENV)/test
	$(RUN) -m mypy

# $(1): commands, $(2): Python, $(3): options. One that fails keeps none of the others from running;
# Ctrl-C does.
define compare
	@status=0; for command in $(1); do \
		echo "python -m benchmarks $$command $(3)"; \
		$(2) -m benchmarks $$command $(3) || { [ $$? = 130 ] && exit 130; status=1; }; \
	done; exit $$status
endef

bench: $(VENV)/demo
	$(call compare,$(COMPARISONS),$(RUN))

# Installs nothing: it takes the torch of PYTHON and builds the extension in place.
gpu:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA GPU')"
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu
	$(PYTHON) -m pytest tests/test_faults.py -m "not gpu"
	$(call compare,$(GPU_COMPARISONS),$(PYTHON),--results $(RESULTS))
	@echo "make gpu: passed; results and pictures are in $(RESULTS)"

# Like gpu, it installs nothing. Without the caching allocator, each tensor has bounds to watch.
sanitize:
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA GPU')"
	$(PYTHON) setup.py -q build_ext --inplace
	@# torch asks for a context before there is one; that is no error of a kernel.
	for tool in "memcheck --report-api-errors no" racecheck initcheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
		$(PYTHON) -m tests.sanitize || exit 1; done
	@echo "make sanitize: memcheck, racecheck and initcheck found nothing"

clean:
	rm -rf $(VENV) $(TIMM_VENV) build dist *.egg-info fused_act/_C*.so fused_act/_host_*.so

# An editable install of the sources alone; the extensions are built in place, where they are needed.
PURE := FUSED_ACT_BUILD_CUDA=0 FUSED_ACT_BUILD_HOST=0

# One stamp for each set of packages, so that a second run installs nothing.
$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q "$(TORCH)" setuptools wheel
	@touch $@

$(VENV)/demo: $(VENV)/torch pyproject.toml
	$(PURE) $(RUN) -m pip install -q --no-build-isolation -e ".[bench]"
	@# Where a GPU is, its kernels take part.
	@if nvidia-smi >/dev/null 2>&1; then \
		$(RUN) -m pip install -q "triton>=3.6" && $(RUN) setup.py -q build_ext --inplace; fi
	@touch $@

$(VENV)/test: $(VENV)/torch pyproject.toml
	$(RUN) -m pip install -q "$(TRITON)"
	$(PURE) $(RUN) -m pip install -q --no-build-isolation -e ".[test,lint,export,zoo,bench]"
	@touch $@

# Beside the other, to be found first where PYTHONPATH says so.
$(VENV)/triton-oldest: $(VENV)/torch
	$(RUN) -m pip install -q --no-deps --upgrade --target $@ "$(TRITON_OLDEST)"
	@touch $@

# timm needs torchvision, and beside a build of that for CUDA transformers does not import.
$(TIMM_VENV)/test:
	$(PYTHON) -m venv $(TIMM_VENV)
	$(RUN_TIMM) -m pip install -q "$(TORCH)" setuptools
	$(RUN_TIMM) -m pip install -q --no-deps "$(TORCHVISION)"
	$(RUN_TIMM) -m pip install -q timm numpy pytest
	@touch $@

# Without nvcc and without a C++ compiler this says what it leaves out, and their tests skip.
$(EXTENSIONS): $(CSRC) setup.py | $(VENV)/test
	$(RUN) setup.py -q build_ext --inplace
	@touch $@
