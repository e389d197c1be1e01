# make demo   sets everything up and streams an answer
# make test   sets everything up and runs the tests
# make check  lint and types

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# One more than there are cores, up to four: some tests wait for processes of theirs.
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))
PROMPT ?= What is a radix tree? Answer in two sentences.

.PHONY: demo chat test check clean

demo: $(VENV)/installed
	$(BIN)/mini-sglang generate --stats "$(PROMPT)"

chat: $(VENV)/installed
	$(BIN)/mini-sglang chat

test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -r requirements.txt
	$(BIN)/python -m pip install --no-deps -e .
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(BIN)/python -m pip install -r requirements-dev.txt
	touch $@
