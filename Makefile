# make demo   multitask prompt tuning from end to end on this machine's CPU, with a report at the end
# make study STUDY=few_shot_mini   a study of gin/studies/ on mini, as fast as the demo (docs/studies/README.md)
# make test   the tests           make lint   ruff, mypy and shellcheck           make format   ruff's formatting
# make mini   pretrains the T5 that ships with the package (an hour)     make mini-sizes   two narrower ones (40 minutes)
# make loader-speed    measures how many examples a second the loader makes (minutes)
# make packing-speed   measures padded, trimmed and packed batches on four tasks in MPT_JAX_DATA (a quarter of an hour)
# make bank-speed   measures prompts trained side by side against separate runs (minutes; SIZE=small takes a larger T5)
# make load-memory   measures the peak memory of loading a T5 1.1 large (3 GB of files each in two formats; minutes)
# make plan-table   plans every size of T5 1.1 for common TPU slices and GPUs, into docs/plan.md (half an hour; goes on where it was stopped)
# make int8-base   measures a random T5 1.1 base in int8 against bfloat16 and float32 (minutes, 6 GB of memory)
# make bench-peft   measures training and decoding beside PEFT on this machine (benchmarks/README.md): DEVICE=gpu, ARGS="--size base"
# make soak   stops studies at random KILLS=50 times, with SEED=0, by SIGNALS="KILL", and compares what they leave (half an hour)
# Each creates .venv from the pinned requirements when it is missing or stale. PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime-installed
DEV := $(VENV)/.dev-installed
PYTEST_ARGS ?= -n 2 --dist loadfile
# Large pages: a quarter less time per step on a CPU, where most of the rest is page faults.
HUGE := glibc.malloc.hugetlb=1
export GLIBC_TUNABLES ?= $(HUGE)

MINI_SIZES := mini-d16 mini-d32
.PHONY: demo study test lint format mini mini-sizes $(MINI_SIZES) soak load-memory plan-table int8-base loader-speed packing-speed \
  bank-speed bench-peft install install-dev clean

# Two CPU devices that share each batch use two cores better than one device with two threads does.
# Memory that is kept rather than given back and asked for again at each step saves a third of the time.
demo study mini $(MINI_SIZES): export GLIBC_TUNABLES := $(HUGE):glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592
demo mini $(MINI_SIZES): export MPT_JAX_COMMAND = make $@
study: export MPT_JAX_COMMAND = make $@ STUDY=$(STUDY)
demo study mini $(MINI_SIZES): export XLA_FLAGS ?= --xla_force_host_platform_device_count=2 --xla_cpu_multi_thread_eigen=false

demo: $(RUNTIME)
	@$(BIN)/python -m mpt_jax pipeline --gin_file=gin/studies/demo.gin

study: $(RUNTIME)
	$(if $(STUDY),,$(error Give the name of a file of gin/studies: make study STUDY=retrieval_mini))
	@$(BIN)/python -m mpt_jax $(if $(shell grep -s ^SweepConfig gin/studies/$(STUDY).gin),sweep,pipeline) --gin_file=gin/studies/$(STUDY).gin

test: $(DEV)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck run_tpu.sh .ci/run docs/launch/job.sbatch

soak: $(DEV)
	PYTHONPATH=.:tests JAX_PLATFORMS=cpu $(BIN)/python tests/soak.py

load-memory: $(DEV)
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python tests/load_memory.py

plan-table: $(DEV)
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python tests/plan_table.py

int8-base: $(RUNTIME)
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python tests/int8_base.py

loader-speed: $(RUNTIME)
	PYTHONPATH=. $(BIN)/python tests/loader_speed.py

packing-speed bank-speed: export GLIBC_TUNABLES := $(HUGE):glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592
packing-speed: $(RUNTIME)
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python tests/packing_speed.py

bank-speed: $(RUNTIME)
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/python tests/bank_speed.py

DEVICE ?= cpu
bench-peft: export GLIBC_TUNABLES := $(HUGE):glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=8589934592
bench-peft: $(DEV)
	$(BIN)/python -m benchmarks.against_peft --device $(DEVICE) $(ARGS)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The embedded T5, from English text in MPT_JAX_CORPUS; within an hour on two cores, and resumed by the same command.
# $(call pretrain,FOLDER,GIN FILE THAT CHANGES THE MODEL): all stages at their rates, each from the run of the one before.
define pretrain
	$(TRAIN) --gin_file=gin/studies/pretrain_mini.gin $(2) --gin.INITIAL_CHECKPOINT_PATH=scratch --gin.MODEL_DIR=$(1)/1 \
	  --gin.VOCABULARY=mpt_jax/assets/mini/sentencepiece.model --gin.LEARNING_RATE=$(word 1,$(RATES))
	$(call continue,$(1)/2,$(1)/1,sketch_lesson_2,5000,$(word 2,$(RATES)),8e-3,$(2))
	$(call continue,$(1)/3,$(1)/2,sketch_lesson_3,16000,$(word 3,$(RATES)),4e-3,$(2))
	$(call continue,$(1)/4,$(1)/3,mini_spans,1500,$(word 4,$(RATES)),2e-3,$(2))
	$(call continue,$(1)/5,$(1)/4,mini_prefix,700,$(word 5,$(RATES)),2e-3,$(2))
endef
# Of AdamW: half the width, twice the rate.
RATES := 1.5e-3 1.2e-3 1.2e-3 5e-4 5e-4
mini-d32: RATES := 3e-3 2.4e-3 2.4e-3 1e-3 1e-3
mini-d16: RATES := 6e-3 4.8e-3 4.8e-3 2e-3 2e-3
TRAIN = $(BIN)/python -m mpt_jax train
# $(call continue,RUN,FROM,MIXTURE,STEPS,RATE,RATE OF POSITION BIASES,GIN FILE)
continue = $(TRAIN) --gin_file=gin/studies/continue_mini.gin $(7) --gin.MODEL_DIR=$(1) --gin.INITIAL_CHECKPOINT_PATH=$(2) \
  --gin.MIXTURE_OR_TASK_NAME=$(3) --gin.TRAIN_STEPS=$(4) --gin.LEARNING_RATE=$(5) --gin.BIAS_LEARNING_RATE=$(6)
MINI := runs/mini
mini: $(RUNTIME)
	$(call pretrain,$(MINI),)
	$(BIN)/python -m tasks.mini_release $(foreach stage,1 2 3 4 5,$(MINI)/$(stage)) mpt_jax/assets/mini

# Two narrower minis by the same steps, for gin/studies/sizes_mini.gin.
mini-sizes: $(MINI_SIZES)
$(MINI_SIZES): mini-%: $(RUNTIME)
	$(call pretrain,runs/mini_$*,--gin_file=gin/sizes/mini_$*.gin)

install: $(RUNTIME)
install-dev: $(DEV)

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || { \
	  echo "mpt_jax needs Python 3.11, 3.12 or 3.13, but $(PYTHON) is $$($(PYTHON) --version 2>&1); run make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Order-only on the interpreter: only the requirements decide whether an environment is stale.
$(RUNTIME): requirements.txt | $(BIN)/python
	@echo "Installing requirements.txt into $(VENV) (minutes, once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(DEV): requirements-dev.txt requirements.txt | $(BIN)/python
	@echo "Installing requirements-dev.txt into $(VENV) (minutes, once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $(RUNTIME) $@
