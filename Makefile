# `make demo` and `make test` do all the set-up themselves; they need python3 (3.11 or later) alone.

PYTHON ?= python3
RUN = .venv/bin/python

demo: .venv/core  ## distil the toy teacher twice and write runs/demo/report.html
	$(RUN) -m tools.demo

test: .venv/all  ## all tests, on the CPU
	$(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile

ablation: .venv/core  ## the README's tables and docs/ablation, about six hours; goes on after a stop
	$(RUN) -m tools.ablation
	$(RUN) -m tools.ablation_report

ablation-quick: .venv/core  ## one seed and 64 prompts of its main rows, in runs/ablation-quick
	$(RUN) -m tools.ablation --quick

weights: .venv/core  ## train the shipped teacher and interpolator again, about 40 minutes
	$(RUN) train.py teacher --out runs/teacher --compile
	$(RUN) train.py interpolator --out runs/interpolator

bench: .venv/all  ## what things cost, counted and timed: ten minutes; writes the README's tables
	$(RUN) -m tools.bench

gpu-check: .venv/all  ## on a GPU: the kernels' tests and benchmark, a distillation; prints one block
	$(RUN) -m tools.gpu_check

torture: .venv/all  ## kill runs, fill disks and feed garbage: ten minutes
	$(RUN) -m tests.torture

bench-1.3b: .venv/all  ## a Wan2.1-1.3B of random weights through sample.py; 3.5 GB of disk
	$(RUN) -m tests.full_size

.venv/core: pyproject.toml constraints.txt
	$(PYTHON) -c "import sys; assert sys.version_info >= (3, 11), 'Python 3.11 or later is needed; try: make PYTHON=python3.12'"
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install -q -c constraints.txt -e .
	touch $@

.venv/all: .venv/core  # what Wan2.1 and the tests need as well
	$(RUN) -m pip install -q -c constraints.txt -e ".[test]"
	touch $@

clean:  ## the environment and all runs
	rm -rf .venv runs

.PHONY: demo test ablation ablation-quick weights bench gpu-check torture bench-1.3b clean
