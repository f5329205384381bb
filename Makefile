# Everything happens in .venv; PYTHON names the interpreter that makes it (3.10 or newer).
PYTHON ?= python3
SERVERS_PYTHON ?= python3.11
BIN := .venv/bin
# What starts runs of its own, kills them and starts them again.
PROCESSES := $(addprefix tests/test_,$(addsuffix .py,resume parallel ahead tree_run))
# What the Triton kernels are interpreted for, in a process of its own: it can do nothing else with Triton.
INTERPRETED := $(filter-out tests/test_ops_extension.py,$(wildcard tests/test_ops_*.py))
INTERPRETED_ALONE := tests/test_ops_regimes.py
PIP := $(BIN)/pip install --disable-pip-version-check -q -c constraints.txt

.PHONY: setup demo test compiled processes interpreted slow wheel wheels gpu matrix lint bench servers kernels asan clean

setup: .venv/ready

.venv/ready: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	$(PYTHON) -m venv .venv
	$(PIP) torch torchvision setuptools wheel
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/mekd run --config configs/digits.yaml

# Two at a time, of one thread each: Triton either compiles or interprets, and two pools of threads would fight. A card
# is hidden, so that these tests are the same everywhere; make gpu is for the card.
test: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(MAKE) -j2 --no-print-directory compiled processes interpreted

compiled: setup
	$(BIN)/python -m pytest $(addprefix --ignore=,$(PROCESSES) $(INTERPRETED_ALONE))

processes: setup
	$(BIN)/python -m pytest $(PROCESSES)

interpreted: setup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(INTERPRETED) -k "not reference and not cpp"

# What takes too long for every change: marked slow, the wheel among it.
slow: setup
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

# What is installed: sdist, wheel, an environment outside this folder, a run there.
wheel: setup
	$(BIN)/python -m pytest -m slow tests/test_wheel.py

# What is shipped, into dist/: sdist and manylinux wheel, audited; docs/packaging.md.
wheels: setup
	$(PIP) 'mekd[dist]'  # mekd itself is there
	$(BIN)/python -m bench wheels

# On a machine with a card: the tests that need one, and every loss on it against float64.
gpu: setup
	$(BIN)/python -m pytest -m gpu
	$(BIN)/mekd selftest --device cuda

# Each torch that mekd is for, in an environment of its own: docs/matrix.md. Takes hours, and 6 GB at a time.
matrix: setup
	$(BIN)/python -m bench matrix

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy mekd
	$(BIN)/mypy --platform darwin mekd

.PHONY: docs notebooks
# The documentation as a site, in site/: nothing is downloaded. A missing page, link or anchor is an error.
# python -m http.server -d site shows it.
docs: setup
	$(BIN)/python docs/build.py

# The notebooks run again, with the output that the site shows.
notebooks: setup
	rm -rf build/notebooks && mkdir -p build && cp -r notebooks build/notebooks
	cd build/notebooks && PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 python -m nbconvert --execute --to notebook --inplace \
		--coalesce-streams --ExecutePreprocessor.record_timing=False *.ipynb
	cp build/notebooks/*.ipynb notebooks

bench: setup
	$(BIN)/python -m bench limits
	$(BIN)/python -m bench losses --quick

# The client against real servers of the Open Inference Protocol, Triton and MLServer, in an environment of their own:
# of Python 3.11, since Triton's wheel wants NumPy 1.26, and with the ONNX Runtime of the file that answers are compared
# with.
servers: setup .venv-servers/ready
	$(BIN)/python -m bench servers

.venv-servers/ready: constraints.txt
	$(SERVERS_PYTHON) -m venv .venv-servers
	.venv-servers/bin/pip install --disable-pip-version-check -q nvidia-pytriton==0.7.0 mlserver==1.7.1 \
		numpy==1.26.4 onnxruntime==$$(sed -n 's/^onnxruntime-gpu==//p' constraints.txt)
	touch $@

kernels: setup
	$(BIN)/python setup.py -q build_ext --inplace --force

asan: setup
	CFLAGS="-fsanitize=address -fno-omit-frame-pointer" LDFLAGS=-fsanitize=address \
		$(BIN)/python setup.py -q build_ext --inplace --force
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
		$(BIN)/python -m pytest -q tests/test_ops_*.py -k "not compile and not stable_abi"

clean:
	rm -rf .venv .venv-servers build site .cache mekd/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
