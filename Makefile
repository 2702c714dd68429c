# Both targets do all their own set-up, in .venv.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: demo test faults format clean

demo: $(VENV)/installed
	$(RUN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
		examples/train_officehome.py --demo --output_dir out/demo

test: $(VENV)/installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses auto --dist loadfile

# Seeded faults, at full length; see tests/faults.
faults: $(VENV)/installed
	OMP_NUM_THREADS=1 $(RUN)/python -m tests.faults

format: $(VENV)/installed
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

clean:
	rm -rf $(VENV) out

$(VENV)/installed: constraints.txt setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet -c constraints.txt -e '.[test]'
	touch $@
