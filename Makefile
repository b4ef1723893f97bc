# make demo      train networks on real images with fused activations; tables and pictures
# make check     lint, types, and every row on every path that runs here, in a minute and a half
# make test      the same and every test once, both compilers and the interpreter, in minutes
# make test-all  all that is left: sweeps, models, broken installs, distributed, architectures
# make gpu       where a GPU and torch are: tests, comparisons, pictures and a verdict, into
#                RESULTS=folder; BASELINE=folder has results of this GPU to compare with. Its stages:
#                gpu-test, gpu-speed, gpu-networks, gpu-memory, gpu-accuracy, gpu-pictures
# make gpu-...   what `make gpu` leaves out: gpu-test-all, gpu-edges, gpu-compiled, gpu-overhead
# make sanitize  likewise: every kernel under compute-sanitizer
# make mutate    seed bugs and see that the tests catch each; writes tests/mutations.md
# make bench     the comparisons and their pictures, on whatever is here

SHELL := /bin/bash
PYTHON ?= python3
RESULTS ?= benchmarks/results/gpu
BASELINE ?= $(RESULTS)
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
# On as many cores as there are, up to four: each process imports torch and what goes with it.
PARALLEL := -n auto --maxprocesses 4 --dist worksteal
TESTS := -m pytest $(PARALLEL) --durations 10
# Once more without the host extension: what depends on how a call gets to the kernels.
IN_PYTHON := --without-host-extension $(addprefix tests/test_,$(addsuffix .py,autograd compile \
	compiled_derivatives concurrency distributed export faults kernels rematerialization))

.PHONY: demo check test test-all mutate gpu sanitize lint types bench clean smoke smoke-interpreted \
	gpu-build gpu-pictures

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

bench: $(VENV)/demo
	@status=0; $(foreach command,$(COMPARISONS),$(call run,bench,$(RUN) -m benchmarks $(command)); ) \
	exit $$status

# $(1): a target, $(2): a command of it. One that fails keeps none of the others from running; Ctrl-C
# does. A status of 124 or 137 is that of `timeout`.
define run
echo '$(1): $(2)'; $(2) || { code=$$?; status=1; case $$code in \
	130) exit 130 ;; \
	124 | 137) echo '$(1): cut off, since its time is over; make $(1) goes on where it ended' ;; \
	*) echo "$(1): FAILED, see above" ;; esac; }
endef

# `make gpu` and all that follows installs nothing: it takes the torch of PYTHON and builds the
# extension in place. Each stage has a file, which the stage puts into RESULTS when it is complete. So
# where the file is the stage is done, and if `make gpu` was cut off the next one goes on from there.
STAGES := gpu-test gpu-speed gpu-networks gpu-memory gpu-accuracy
BY_THEMSELVES := gpu-test-all gpu-edges gpu-compiled gpu-overhead
.PHONY: $(STAGES) $(BY_THEMSELVES)
BUILD = $(PYTHON) setup.py -q build_ext --inplace
MEASURE = $(PYTHON) -m benchmarks
PICTURES = $(MEASURE) plot $(INTO)
INTO = --results $(RESULTS)
# In seconds. The rest of the stages has no limit; it is meant for half a minute.
TEST_LIMIT ?= 240
SPEED_LIMIT ?= 120
NETWORKS_LIMIT ?= 90

gpu-test.file := tests.csv
gpu-test.command = $(call gpu_tests,(gpu or with_gpu) and not overlapping,$(TEST_LIMIT),tests.csv)
gpu-speed.file := speed.csv
gpu-speed.command = $(MEASURE) speed $(INTO) --time-limit $(SPEED_LIMIT)
gpu-networks.file := networks.csv
gpu-networks.command = $(MEASURE) networks $(INTO) --time-limit $(NETWORKS_LIMIT)
gpu-memory.file := memory.csv
gpu-memory.command = $(MEASURE) memory $(INTO)
gpu-accuracy.file := accuracy.csv
gpu-accuracy.command = $(MEASURE) accuracy $(INTO)
gpu-test-all.file := tests_all.csv
gpu-test-all.command = $(call gpu_tests,gpu or with_gpu,0,tests_all.csv)
gpu-edges.file := speed_edges.csv
gpu-edges.command = $(MEASURE) speed --edges $(INTO)
gpu-compiled.file := networks_compiled.csv
gpu-compiled.command = $(MEASURE) networks --compiled $(INTO)
gpu-overhead.file := overhead.csv
gpu-overhead.command = $(MEASURE) overhead $(INTO)

# $(1): which tests, by their markers, $(2): seconds until they are interrupted, 0 for none, $(3): the
# file. As many processes as there are cores, each with one thread; more than 16 would fill the GPU's
# memory with contexts. `loadscope` keeps to the groups of tests/tiers.py.
gpu_tests = timeout --foreground -s INT -k 20 $(2) \
	$(if $(XDIST),env OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1) \
	$(PYTHON) -m pytest -q --durations 10 -m "$(1)" \
	$(if $(XDIST),-n auto --maxprocesses 16 --dist loadscope) --outcomes=$(RESULTS)/$(3)
XDIST = $(shell $(PYTHON) -c "import xdist" 2>/dev/null && echo installed)
gpu-test.note = $(if $(XDIST),one process for each core,pytest-xdist is not installed: one process)
gpu-test-all.note = $(gpu-test.note)

# $(1): a stage.
define stage
if [ -e $(RESULTS)/$($(1).file) ]; then \
	grep -qF "$$(git describe --always --dirty 2>/dev/null)" $(RESULTS)/$($(1).file) \
		&& of= || of=", of another commit"; \
	echo "$(1): $(RESULTS)/$($(1).file) is there already$$of; remove it to run $(1) again"; \
	if grep -qE ',(failed|error),[0-9]' $(RESULTS)/$($(1).file); then \
		echo "$(1): FAILED, as that file says"; status=1; fi; \
else $(if $($(1).note),echo "$(1): $($(1).note)";) $(call run,$(1),$($(1).command)); fi
endef

define needs_gpu
@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('torch sees no CUDA GPU')"
endef

# `compare` decides in the end, of what failed in an earlier `make gpu`, too.
gpu:
	$(needs_gpu)
	@trap 'exit 130' INT; status=0; \
	$(call run,gpu-build,$(BUILD)); \
	$(foreach name,$(STAGES),$(call stage,$(name)); ) \
	$(call run,gpu-pictures,$(PICTURES)); \
	$(call run,gpu,$(MEASURE) compare $(BASELINE) $(RESULTS)); \
	if [ $$status = 0 ]; then echo "make gpu: passed; results and pictures are in $(RESULTS)"; \
	else echo "make gpu: FAILED, see above; results are in $(RESULTS)"; fi; exit $$status

gpu-build:
	$(needs_gpu)
	$(BUILD)

$(STAGES) $(BY_THEMSELVES): gpu-build
	@trap 'exit 130' INT; status=0; $(call stage,$@); exit $$status

gpu-pictures:
	$(PICTURES)

# Without the caching allocator each tensor has bounds to watch. Every tool runs once for each
# backend and dtype, all at the same time, and what it says is in a file of its own. racecheck looks
# at what threads share, and initcheck at what is read, for which few sizes do.
SANITIZERS := $(foreach tool,memcheck racecheck initcheck,$(foreach backend,triton cuda,\
	$(foreach dtype,float16 bfloat16 float32,$(tool)-$(backend)-$(dtype))))
# torch asks for a context before there is one; that is no error of a kernel.
memcheck.options := --report-api-errors no
racecheck.tests := --sharing
initcheck.tests := --sizes 9 4105 --offsets 1
SANITIZE_LIMIT ?= 150
LOGS := build/sanitize

sanitize:
	$(needs_gpu)
	@compute-sanitizer --version >/dev/null || { echo "needs compute-sanitizer, of the CUDA toolkit"; exit 1; }
	$(BUILD)
	@if $(MAKE) --no-print-directory -k -j $(words $(SANITIZERS)) $(addprefix sanitize-,$(SANITIZERS)); \
	then echo "make sanitize: memcheck, racecheck and initcheck found nothing"; \
	else echo "make sanitize: FAILED, see above and $(LOGS)"; exit 1; fi

sanitize-%: part = $(word $(1),$(subst -, ,$*))
sanitize-%:
	@mkdir -p $(LOGS)
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1 timeout --foreground -k 5 $(SANITIZE_LIMIT) \
		compute-sanitizer --tool $(call part,1) $($(call part,1).options) --error-exitcode 1 \
		$(PYTHON) -m tests.sanitize --backends $(call part,2) --dtypes $(call part,3) \
		$($(call part,1).tests) >$(LOGS)/$*.log 2>&1; code=$$?; \
	if [ $$code = 0 ] && grep -q 'SUMMARY: 0 ' $(LOGS)/$*.log && \
		said=$$(grep '^sanitize: ' $(LOGS)/$*.log); then echo "$*: $$said"; else \
		tail -n 15 $(LOGS)/$*.log; \
		[ $$code = 124 ] && echo "$*: not done within $(SANITIZE_LIMIT) seconds" \
			|| echo "$*: FAILED, see $(LOGS)/$*.log"; exit 1; fi

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
