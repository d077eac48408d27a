# make setup   build .venv from requirements/lock.txt (done by the other targets as well)
# make demo    the main job on real data: train on two workers, save, load, score
# make test    all tests but the next three; make lint: ruff, mypy and the layering test
# make test-long      the tests that take minutes, the notebooks and the S3 and HDFS servers among them
# make test-rdma      the tests that need an RDMA device, on a virtual machine where there is none; some 5 minutes
# make test-rdma-fit  a whole fit over RDMA there, and parameter servers; some 15 minutes; make test-rdma-all: both
#                     make test-rdma PYVERBS=59.0: with that pyverbs of PyPI and its rdma-core, built once, not Debian's
# make lock    resolve the dependencies of setup.cfg anew into requirements/lock.txt
# make notebooks   run the notebooks and keep their outputs; make bench: the benchmarks
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-session test-clusters test-long test-rdma test-rdma-fit test-rdma-all lint lock notebooks bench clean

SHELL := /bin/bash
BIN := .venv/bin
STAMP := .venv/.installed
# The machine's certificates where it has them: a company's proxy is trusted by them, not by uv's own list.
UV := $(BIN)/uv --quiet --no-progress $(if $(wildcard /etc/ssl/certs/ca-certificates.crt),--system-certs)
PYTEST := $(BIN)/python -m pytest
# Whole files of tests at the same time, each process with a Spark of its own: some 3 GB of memory each.
SIDE_BY_SIDE := --numprocesses 2 --dist loadfile
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
# Of all scripts but those that need ten gigabytes of memory, a virtual machine or root.
BY_HAND := $(addprefix benchmarks/,large_model.py rdma.py overlap.py pushes_over_link.py link.py)
BENCHMARKS := $(filter-out $(BY_HAND),$(wildcard benchmarks/*.py))
# With TensorFlow, which takes minutes where the machine is emulated.
RDMA_FITS := tests/rdma/test_rdma_fit.py tests/rdma/test_rdma_servers.py
PYVERBS_OPTION := $(addprefix --pyverbs ,$(PYVERBS))
# Extras that the lock holds: all that tests, notebooks and the demo use.
EXTRAS := local connect tls tensorboard test notebooks

help:
	@sed -n 's/^# make/make/p' Makefile

setup: $(STAMP)

$(STAMP): requirements/lock.txt requirements/uv.txt setup.cfg pyproject.toml
	@requirements/make_venv.sh .venv
	@echo "Installing $$(grep -c == requirements/lock.txt) packages into .venv ..."
	@$(BIN)/python -m pip --quiet --disable-pip-version-check install -r requirements/uv.txt
	@VIRTUAL_ENV=.venv $(UV) pip sync --compile-bytecode requirements/lock.txt
	@VIRTUAL_ENV=.venv $(UV) pip install --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(STAMP)
	@$(BIN)/python examples/mnist_pipeline.py

# One process holds one Spark, so each kind of Spark has a pytest of its own; all run, then failures count.
test: $(STAMP)
	@$(MAKE) --no-print-directory --keep-going --jobs 2 test-session test-clusters

test-session: $(STAMP)
	@$(PYTEST) $(SIDE_BY_SIDE) tests --ignore tests/local_cluster --ignore tests/connect

# Beside the others: what these have to say comes as a whole, when they are done.
test-clusters: $(STAMP)
	@said=$$(mktemp); trap 'cat $$said; rm -f $$said' EXIT; failed=0; \
	for kind in local_cluster connect; do $(PYTEST) tests/$$kind >> $$said 2>&1 || failed=1; done; \
	exit $$failed

test-long: $(STAMP)
	@$(PYTEST) tests -m long --timeout 900 --ignore tests/local_cluster --ignore tests/connect

test-rdma: $(STAMP)
	@$(BIN)/python tests/rdma/vm.py $(PYVERBS_OPTION) --timeout 1200 $(PYTEST) tests/rdma $(foreach fit,$(RDMA_FITS),--ignore $(fit))

test-rdma-fit: $(STAMP)
	@$(BIN)/python tests/rdma/vm.py $(PYVERBS_OPTION) --timeout 1800 --java --memory 8G $(PYTEST) tests/rdma/test_rdma_fit.py
	@$(BIN)/python tests/rdma/vm.py $(PYVERBS_OPTION) --timeout 1200 $(PYTEST) tests/rdma/test_rdma_servers.py

# One after the other: each keeps a core busy.
test-rdma-all: $(STAMP)
	@$(MAKE) --no-print-directory test-rdma
	@$(MAKE) --no-print-directory test-rdma-fit

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(PYTEST) -q tests/test_layering.py

lock: $(STAMP)
	@VIRTUAL_ENV=.venv $(UV) pip compile setup.cfg requirements/dev.in \
	  $(addprefix --extra ,$(EXTRAS)) --override requirements/override.txt \
	  --universal --python-version 3.11 --no-header --no-annotate --upgrade \
	  --output-file requirements/lock.txt > /dev/null

notebooks: $(STAMP)
	@for notebook in $(NOTEBOOKS); do \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
	    --ExecutePreprocessor.record_timing=False --coalesce-streams $$notebook || exit 1; \
	done

bench: $(STAMP)
	@for benchmark in $(BENCHMARKS); do $(BIN)/python $$benchmark || exit 1; done

clean:
	@rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis \
	  spark-warehouse metastore_db derby.log
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
