# Every target sets up what it needs: a fresh machine needs python and make alone.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEEPSPEED := .venv-deepspeed

export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: demo test test-fast test-compat test-ray lint docs gpu-check hub clean

demo: $(STAMP)
	$(BIN)/selsft demo

# Two processes side by side. The Triton kernels run in the interpreter, under which everything else would crawl.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test: $(STAMP) $(DEEPSPEED)/.installed .browser
	TRITON_INTERPRET=1 $(PYTEST) tests/triton
	$(PYTEST) tests --ignore tests/triton

# What one wants while editing, in two minutes.
test-fast: $(STAMP)
	$(PYTEST) -m "not slow" tests --ignore tests/triton

# What the tests of the pages need; where it cannot be had, they say that they were skipped.
.browser:
	command -v chromium >/dev/null || { apt-get update && apt-get install -y --no-install-recommends chromium; } || true
	npm install --silent --prefix $@ axe-core@4 || mkdir -p $@

# The tests of ZeRO launch their processes here. It holds DeepSpeed alone and reads the rest from the main environment,
# where accelerate would behave differently as soon as DeepSpeed could be imported.
$(DEEPSPEED)/.installed: $(STAMP)
	test -x $(DEEPSPEED)/bin/python || $(PYTHON) -m venv $(DEEPSPEED)
	echo "import site; site.addsitedir('$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages)')" \
		> $$(echo $(DEEPSPEED)/lib/python3*/site-packages)/selsft.pth
	$(DEEPSPEED)/bin/python -m pip install --quiet --constraint constraints.txt deepspeed
	touch $@

# Scoring on a local Ray cluster whose workers are killed. Ray is in an environment on top of the other one.
RAY := .venv-ray
test-ray: $(RAY)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR):$(CURDIR)/kernels $(RAY)/bin/python -m pytest -q tests/test_score_ray.py

$(RAY)/.installed: $(STAMP)
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > $$(echo $(RAY)/lib/python*/site-packages)/below.pth
	$(RAY)/bin/python -m pip install --quiet --constraint constraints.txt "ray[data]"
	touch $@

# The core tests with the oldest supported versions; `make test` has the newest tested ones.
OLDEST := .venv-oldest
test-compat: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n 2 --dist worksteal tests/training/test_equals_sft.py tests/training/test_trainer.py \
		tests/scoring/test_logprobs.py tests/scoring/test_reference.py tests/data tests/training/test_compatibility.py

$(OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable ".[test]"
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# The site in build/site; a warning is an error. Reading it needs no network either.
docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# On a machine with a GPU: correctness first, then the benchmarks, then the bars of docs/kernel-log.md.
gpu-check: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	$(BIN)/python benchmarks/gpu_check.py

# The kernels in the layout of the kernel hub; its builder, which is not run here, makes `_ops.py`.
HUB ?= build/hub
hub:
	mkdir -p $(HUB)/torch-ext/selsft_kernels
	cp kernels/hub/* kernels/README.md $(HUB)
	cp kernels/selsft_kernels/*.py $(HUB)/torch-ext/selsft_kernels
	rm $(HUB)/torch-ext/selsft_kernels/_ops.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(DEEPSPEED) $(RAY) $(OLDEST) build dist
