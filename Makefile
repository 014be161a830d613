# `make` lists the targets. Each one sets up .venv first and needs only python3, 3.11 or later.
# CONTRIBUTING.md has the same commands for systems without make.

PYTHON ?= python3
RUN = .venv/bin/python
PIP = $(RUN) -m pip install -q --no-compile -c constraints.txt
# Compiling all packages takes a minute. Python compiles those that are imported, and keeps the result.
unexport PYTHONDONTWRITEBYTECODE

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z].*:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

demo: .venv/core  ## distil the toy teacher with DMD and with AVD; writes runs/demo/report.html
	$(RUN) -m tools.demo

test: .venv/all  ## check the style, then run the tests on the CPU
	$(RUN) -m ruff check .
	$(RUN) -m pytest -q -m "not long" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-long: .venv/all  ## run the tests that take long
	$(RUN) -m pytest -q -m long

torture: .venv/all  ## kill training runs, fill the disk, feed damaged files to every reader, cut the power
	$(RUN) -m tests.torture

torture-ranks: .venv/all  ## kill one of two ranks under torchrun, again and again
	$(RUN) -m tests.torture --ranks

ablation: .venv/core  ## measure all results in the toy world again (hours; resumes after a stop)
	$(RUN) -m experiments.ablation

bench: .venv/all  ## count and time what things cost; writes docs/costs.md
	$(RUN) -m experiments.bench
	$(RUN) -m tools.plan tables

bench-1.3b: .venv/all  ## run a Wan2.1-1.3B of random weights on the CPU (3.5 GB of disk)
	$(RUN) -m tests.full_size

gpu-check: .venv/all  ## test and time the code on your GPU, with DIR= also the real Wan2.1 there
	$(RUN) -m tools.gpu_check$(if $(DIR), --model $(DIR))

weights: .venv/core  ## train the toy's teacher, interpolator and student again
	$(RUN) -m experiments.teacher --out runs/teacher --compile --score-prompts 512
	$(RUN) train.py interpolator --out runs/interpolator
	cp runs/interpolator/interpolator.safetensors runs/teacher
	$(RUN) train.py distill --out runs/student --model runs/teacher --steps 300
	$(RUN) -m tools.export --model runs/student --out runs/toy-student --layout original --dtype float16

clean:  ## delete .venv and all runs
	rm -rf .venv runs

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or later is needed; try: make PYTHON=python3.12'"
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/all: .venv/core  # adds what Wan2.1 and the tests need
	$(PIP) -e ".[test]"
	touch $@

.PHONY: help demo test test-long torture torture-ranks ablation bench bench-1.3b gpu-check weights clean
