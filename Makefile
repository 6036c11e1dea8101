# Each target makes the virtual environment in .venv and installs what it needs.
PYTHON ?= python3
VENV := .venv
MNIST ?= mnist.npz
DATA ?= .
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-slow test-browser test-fuzz test-sklearn lint format bench bench-compact bench-embeddings bench-features bench-files bench-linear bench-quality docs clean

demo: $(VENV)/.demo
	$(BIN)/torchreg compare

# Two processes of one thread each: with two threads each they wait for each other, which took twice as long.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

# What takes minutes, and `make test` leaves out: long examples, all optimizers in several processes, all combinations
# of parameters (tests/covering.py), and more.
test-slow: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

# A tour of TensorBoard's page in headless Chromium (apt-get install chromium chromium-driver); pictures in runs/tour.
test-browser: $(VENV)/.browser
	$(BIN)/python -m pytest -rs tests/test_tensorboard_page.py

# Scikit-learn's own tests on torchreg.linear, all of them: some minutes.
test-sklearn: $(VENV)/.dev
	$(BIN)/python tests/sklearn_suite.py

# Ten thousand damaged and hostile files through every loader: some minutes.
test-fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 tests/test_fuzzed_files.py tests/test_hostile_state_dicts.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The site, in docs/_build/html. Warnings are errors.
docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

bench: $(VENV)/.bench
	$(BIN)/python benchmarks/step.py

bench-compact: $(VENV)/.dev
	$(BIN)/python benchmarks/compact.py

bench-embeddings: $(VENV)/.demo
	$(BIN)/python benchmarks/embeddings.py

bench-files: $(VENV)/.demo
	$(BIN)/python benchmarks/sparse_files.py

# In an environment of its own: adelie needs an older NumPy. About a quarter of an hour.
bench-linear: $(VENV)-peers/.ready
	$(VENV)-peers/bin/python benchmarks/linear.py
	$(VENV)-peers/bin/python benchmarks/linear_gpu.py
	$(VENV)-peers/bin/python benchmarks/logistic.py

# In an environment of its own, with LassoNet, whose runs take most of the time, an hour or more. DATA=folder of
# mnist.npz, fashion_mnist.npz and mice_protein.npz.
bench-features: $(VENV)-features/.ready
	$(VENV)-features/bin/python benchmarks/features.py --data $(DATA)

# Up to an hour and a half. MNIST=path/to/mnist.npz says where the images are.
bench-quality: $(VENV)/.demo
	$(BIN)/python benchmarks/lenet.py --data $(MNIST)
	$(BIN)/python benchmarks/lenet_settling.py --data $(MNIST)
	$(BIN)/python benchmarks/compare_routes.py

clean:
	rm -rf $(VENV) $(VENV)-peers $(VENV)-features docs/_build docs/_examples docs/auto_examples docs/auto_gallery runs .mypy_cache .pytest_cache .ruff_cache

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) ".[dev]"
	touch $@

$(VENV)/.browser: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) ".[browser]"
	touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) ".[docs]"
	touch $@

$(VENV)/.bench: $(VENV)/.python pyproject.toml constraints.txt
	$(INSTALL) ".[bench]"
	touch $@

$(VENV)-peers/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[sklearn]" celer skglm adelie
	touch $@

$(VENV)-features/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-features
	$(VENV)-features/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[sklearn]" lassonet
	touch $@
