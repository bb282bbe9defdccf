# Short recipes; `make help` lists them. Two commands are enough on a new machine: `make run` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
COLAB := .venv-colab
NOTEBOOKS = $(wildcard notebooks/*.ipynb)
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout 1200 --nbval-sanitize-with notebooks/nbval_sanitize.cfg
# unit tests run in this many processes, each test file in one of them, each process with one thread
WORKERS ?= 2
UNIT := -q -m "not slow and not soak" -n $(WORKERS) --dist loadfile
# one thread a process: two make the bundled models slower, and tests, kernels and workers run beside each other
export OMP_NUM_THREADS ?= 1
# threads that wait sleep: on a busy machine spinning ones make small models many times slower
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help run test test-slow check unit nbval notebooks colab screenshots models bench sweep-demo compare-demo soak install clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

run: .venv/.installed  ## execute the whole notebook suite headless into results/ and say what was found
	$(BIN)/nbhelpers notebooks run --out results

test: check unit nbval  ## everything that is quick: style, unit tests, notebook checks, nbval

check: .venv/.installed  ## style only: formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

unit: .venv/.installed  ## unit tests without the slow tier
	NBHELPERS_REQUIRE_LMEVAL=1 $(BIN)/python -m pytest $(UNIT)

nbval: .venv/.installed  ## compare the committed notebooks with a fresh execution, cell by cell
	$(if $(NOTEBOOKS),HF_HUB_OFFLINE=1 NBHELPERS_HEADLESS=1 $(BIN)/python -m pytest -q $(NBVAL) $(NOTEBOOKS),@echo "no notebooks yet")

test-slow: .venv/.installed $(COLAB)/.installed  ## the slow tier, then the unit tests under Colab's versions
	NBHELPERS_REQUIRE_LMEVAL=1 $(BIN)/python -m pytest -q -m "slow and not soak" -n $(WORKERS) --dist loadfile
	NBHELPERS_REQUIRE_BROWSER=0 $(COLAB)/bin/python -m pytest $(UNIT)
	$(COLAB)/bin/python -m pytest -q -m "slow and not soak" tests/test_colab_stack.py

notebooks: .venv/.installed  ## execute the notebooks again and store them with their outputs
	$(BIN)/nbhelpers notebooks refresh

colab: .venv/.installed  ## write the notebooks as self-contained files for Colab into dist/colab
	$(BIN)/nbhelpers notebooks colab --out dist/colab

screenshots: .venv/.installed  ## take the pictures of docs/images again (needs Debian's chromium)
	$(BIN)/python -m tests.browser_lab docs/images

models: .venv/.installed  ## train the bundled tiny models again
	$(BIN)/python -m nbhelpers.pretrain

bench: export OMP_NUM_THREADS = 2
bench: .venv/.installed  ## side-by-side measurements against peers, one after the other
	@set -e; for file in $(filter-out benchmarks/soak.py benchmarks/soak_sweep.py benchmarks/sweep_demo.py benchmarks/comparison_demo.py,$(wildcard benchmarks/[a-z]*.py)); do [ -f "$$file" ] || { echo "no benchmarks yet"; break; }; \
	  echo "== $$file"; $(BIN)/python "$$file"; done

sweep-demo: .venv/.installed  ## 360 rows of sparsity on two bundled models: an hour on two cores, goes on where it was
	$(BIN)/python benchmarks/sweep_demo.py --readme README.md

compare-demo: .venv/.installed  ## large against small tuned models on bundled dialogues; MTS=mts_dialog.jsonl adds real ones
	$(BIN)/python benchmarks/comparison_demo.py --readme README.md $(if $(MTS),--mts $(MTS))

soak: .venv/.installed  ## long fault runs: 20 kills of fine-tuning runs, 80 of sweeps, their tables in README and benchmarks/results
	$(BIN)/python benchmarks/soak.py --readme README.md
	$(BIN)/python benchmarks/soak_sweep.py --readme README.md

install: .venv/.installed  ## only create .venv

.venv/.installed: pyproject.toml constraints.txt nbhelpers/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which with: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore $(BIN)/pip install -q -e '.[notebooks,quant,tensorboard,wandb,search,ray,lmeval,test,browser,dev]' -c constraints.txt
	@touch $@

$(COLAB)/.installed: pyproject.toml constraints-colab.txt requirements-colab.txt
	$(PYTHON) -m venv $(COLAB)
	$(COLAB)/bin/python -m pip install -q --upgrade "pip>=25.1"
	PYTHONWARNINGS=ignore $(COLAB)/bin/pip install -q -e '.[quant,test]' -r requirements-colab.txt ipykernel ipywidgets -c constraints-colab.txt
	@touch $@

clean:  ## remove both environments, caches and results
	rm -rf .venv .venv-colab results build dist *.egg-info .pytest_cache .ruff_cache
