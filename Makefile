# Everything happens in .venv, which is made on first use and again when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A suite's tests run on a process for each core: real nodes and brokers mostly wait. tests/conftest.py says what stays
# together. One test by itself: .venv/bin/python -m pytest tests/…
SIDE_BY_SIDE := -n $(shell n=$$(nproc); echo $$((n < 8 ? n : 8)))

.PHONY: demo test lint unit property contract cluster kafka-tests smoke simulate chaos nightly bench kafka fuzz venv clean

# make demo LOG=kafka: on a Kafka broker, which is killed, too.
demo: $(STAMP)
	$(BIN)/oncekeeper demo $(if $(LOG),--log $(LOG))

test: lint unit property contract cluster kafka-tests smoke simulate

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit property contract cluster: $(STAMP)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/$@

# On real brokers, which are got once and die with the tests.
kafka-tests: $(STAMP)
	tools/get-kafka >/dev/null
	tools/get-toxiproxy >/dev/null
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/kafka

# The smoke set of the fault suite on real nodes, and what checks the checkers.
smoke: $(STAMP)
	tools/get-toxiproxy >/dev/null
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) tests/chaos

# Two thousand clusters under virtual time and seeded faults: nothing lost, nothing twice.
SEEDS ?= 2000
simulate: $(STAMP)
	$(BIN)/oncekeeper simulate --seeds $(SEEDS) --quiet

# The whole fault suite: every scenario on three real nodes, and its table. One report each, in a new directory.
CHAOS_REPORT ?= build/chaos-$(shell date +%Y%m%d-%H%M%S)
chaos: $(STAMP)
	tools/get-toxiproxy >/dev/null
	@mkdir -p build
	$(BIN)/oncekeeper chaos run all --report $(CHAOS_REPORT)

# What takes an hour: many seeds, what no seed reaches, every planted bug, the whole fault suite, every reader fuzzed.
NIGHTLY ?= build/nightly
nightly: $(STAMP)
	@mkdir -p $(NIGHTLY)
	$(BIN)/oncekeeper simulate --seed $$(date +%Y%m%d)00000 --seeds 10000 --quiet
	$(BIN)/python -m chaos.simulation.reached --seeds 500 --report $(NIGHTLY)/reached.md
	$(BIN)/oncekeeper simulate --plants --seeds 100 > $(NIGHTLY)/plants.txt
	$(MAKE) chaos CHAOS_REPORT=$(NIGHTLY)/chaos-$$(date +%Y%m%d-%H%M%S)
	$(MAKE) fuzz

bench: $(STAMP)
	$(BIN)/oncekeeper bench

# One Kafka broker on this machine, or three (BROKERS=3), until Ctrl-C; the data stays in oncekeeper-kafka.
kafka: $(STAMP)
	@$(BIN)/oncekeeper kafka up $(if $(BROKERS),--brokers $(BROKERS))

# Every reader of foreign bytes, FUZZ_S seconds each; Atheris is needed for nothing else.
FUZZ_S ?= 30
fuzz: $(STAMP)
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet atheris
	$(BIN)/python tests/chaos/fuzz_atheris.py $(FUZZ_S)

venv: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Oncekeeper needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1)." \
	         "Name another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[sql,test]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
