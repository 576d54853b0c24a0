# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CONFIG ?= digits
OUTPUT ?= outputs/$(CONFIG)

.PHONY: help demo test lint clean

help:
	@echo "make demo   train on handwritten digits, sample, and say how good it is ($(OUTPUT))"
	@echo "            CONFIG=digits_ddpm: the same with the diffusion objective"
	@echo "make test   all tests"
	@echo "make lint   style"
	@echo "make clean  remove .venv and caches"

$(READY): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "djepa_hf needs Python 3.11 or newer, this is " + sys.version)'
	@echo "Setting up $(VENV) (2 GB, a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/python examples/train.py --config examples/configs/$(CONFIG).yaml --output_dir $(OUTPUT)
	rm -rf $(OUTPUT)/evaluation
	$(BIN)/python examples/evaluate_pipeline.py --pipeline $(OUTPUT) --config $(OUTPUT)/sampling.yaml --num_images 1000 \
	    --reference digits --extractor classifier --classifier_data digits --update_card true

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache src/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
