# The whole project in a few commands; each makes the environment it needs. Python 3.11 or newer, Linux x86-64.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE # each of the many processes of a test run would compile all it imports

.PHONY: help env check test soak demo bench bench-peers bench-record bench-build bench-rebuild bench-writes bench-gpu test-gpu test-gpu-double lock clean

help: ## Show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

env: $(VENV)/.done ## Make the environment in .venv

$(VENV)/.done: requirements-dev.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@# By all cores: the lock names all that Python 3.11 needs, so nothing is left to resolve. Another may need more.
	grep -v '^#' requirements-dev.lock | xargs -n 22 -P $$(nproc) $(BIN)/python -m pip install --quiet --no-compile --no-deps
	$(BIN)/python -m pip check || $(BIN)/python -m pip install --quiet --no-compile -r requirements-dev.lock
	$(BIN)/python -m compileall -qq -j 0 -x '/(moto|botocore|rllib|tests)/' $(VENV)/lib # but for what is hardly used
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

check: env ## Format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What starts no cluster and measures no time runs in as many processes as there are cores, with one thread of BLAS and
# OpenMP each: more would wait for each other.
SPREAD := tests/recall tests/model tests/unit tests/contract tests/faults tests/test_layout.py
# A cluster mostly waits: two at once. One that runs jobs needs Ray's port for them, and one test measures: alone.
TWO_CLUSTERS := tests/ray/one_cluster tests/ray/test_up_address.py tests/ray/test_serve_run.py
test: env ## All tests: unit, contract, recall, Ray
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $$(nproc) --dist worksteal $(SPREAD)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup $(TWO_CLUSTERS)
	$(BIN)/python -m pytest $(SPREAD:%=--ignore=%) $(TWO_CLUSTERS:%=--ignore=%)

soak: env ## The model test with ever new seeds until Ctrl-C, or for SECONDS=n
	$(BIN)/python -m tests.model $(SECONDS)

demo: env ## Real vectors on this machine: import, search, measure, restart
	$(BIN)/python examples/demo.py

bench: env ## The served endpoint beside FAISS in process (BENCH="--data ... --queries ..." for other vectors)
	$(BIN)/python -m benchmarks.http_vs_faiss $(BENCH)

bench-peers: env ## Eagleray beside Chroma's server and a plain Ray Serve deployment around FAISS, in one run
	$(BIN)/python -m benchmarks.peers $(BENCH)

bench-record: env ## Record the ratios to FAISS in process that tests/ray/one_eagleray/test_endpoint_speed.py guards
	$(BIN)/python -m benchmarks.speed_guard --record

bench-build: env ## Building segments beside FAISS in process, and two shards at once beside one with two threads
	$(BIN)/python -m benchmarks.build_throughput $(BENCH)

bench-rebuild: env ## Latency of searches before and during rebuilds (BENCH="--help" for options)
	$(BIN)/python -m benchmarks.rebuild_under_load $(BENCH)

bench-writes: env ## Acknowledged writes beside the store's own puts and FAISS's adds (BENCH="--help" for options)
	$(BIN)/python -m benchmarks.writes $(BENCH)

# FAISS for GPUs is not what `make env` installs: name the Python of an environment with eagleray[gpu] and pytest.
GPU_PYTHON ?= python3

test-gpu: ## Tests that need a GPU (GPU_PYTHON=... with eagleray[gpu] and pytest)
	$(GPU_PYTHON) -m pytest -s tests/gpu

test-gpu-double: env ## The same tests, small, by a stand-in on the CPU: whether they are right; no measurement
	EAGLERAY_GPU_DOUBLE=20 $(BIN)/python -m pytest tests/gpu

bench-gpu: ## Raw FAISS and cuVS beside shard, actor and endpoint on a GPU (GPU_PYTHON=..., BENCH="--help" for options)
	$(GPU_PYTHON) -m benchmarks.gpu $(BENCH)

lock: ## Resolve pyproject.toml afresh into requirements-dev.lock
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet --editable '.[cpu,dev]'
	(head -n 1 requirements-dev.lock; $(VENV)-lock/bin/python -m pip freeze --exclude-editable) > requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock && rm -rf $(VENV)-lock

clean: ## Remove the environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis build *.egg-info
