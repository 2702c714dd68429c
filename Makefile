# All targets do their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test faults format clean site wheel wheel-check release-check test-lowest tour

demo: $(VENV)/installed
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_officehome.py --demo --output_dir out/demo

test: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile

# Seeded faults, at full length; see tests/faults.
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.faults

# Runs the notebook and writes its output anew.
tour: $(VENV)/installed
	$(RUN)/python -m tests.tour

# The documentation, in out/site; a link or an anchor that leads nowhere is an error.
site: $(VENV)/installed
	$(RUN)/mkdocs build --quiet --strict

# The wheel is built from the source distribution, as pip would build it.
wheel: $(VENV)/installed
	rm -rf out/dist && mkdir -p out
	$(RUN)/python -m build --no-isolation --outdir out/dist . > out/build.log 2>&1 || (cat out/build.log; false)
	$(RUN)/twine check --strict out/dist/*

# The wheel alone, with what .venv has: its files are complete, and its code needs none of the checkout.
wheel-check: wheel
	rm -rf out/wheel
	$(RUN)/pip install --quiet --no-deps --target out/wheel out/dist/*.whl
	PYTHONPATH=out/wheel HF_HUB_OFFLINE=1 $(RUN)/python tests/release/smoke.py out/wheel

# The wheel in an environment of its own: its requirements are complete, too. Takes minutes and 2 GB.
release-check: wheel
	rm -rf out/release
	$(PYTHON) -m venv out/release
	out/release/bin/pip install --quiet -c constraints.txt out/dist/*.whl
	HF_HUB_OFFLINE=1 out/release/bin/python tests/release/smoke.py out/release

# The lowest versions that setup.cfg allows, in an environment of their own.
LOWEST := tests/tuner/test_peft.py tests/tuner/test_golden.py tests/multitask/test_classifier.py \
	tests/multitask/test_saving.py tests/multitask/test_checkpoints.py tests/multitask/test_predict.py \
	tests/methods/test_linear_probe.py tests/data/test_splits.py tests/data/test_folders.py tests/hub/test_model_card.py
test-lowest:
	$(PYTHON) -m venv out/lowest
	out/lowest/bin/pip install --quiet -c constraints-lowest.txt -e '.[benchmark]' pytest pytest-xdist markdown-it-py
	OMP_NUM_THREADS=1 out/lowest/bin/python -m pytest --numprocesses auto $(LOWEST)

format: $(VENV)/installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) out

$(VENV)/installed: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@
