# make demo: install into .venv and run the main job. make test: everything CI checks.
VENV := .venv
PYTHON := $(VENV)/bin/python
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint types tests newest_dspy benchmarks instructions clean

demo: $(VENV)/installed_for_demo
	$(PYTHON) -m dspy_router.demo $(ARGS)

test: lint types tests

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/installed
	$(VENV)/bin/mypy

tests: $(VENV)/installed  # on busy cores, threads of one torch operation wait long for each other
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q --durations=10

newest_dspy: $(VENV)/installed
	.ci/newest_dspy

benchmarks: $(VENV)/installed
	$(PYTHON) benchmarks/quality.py
	$(PYTHON) benchmarks/latency.py
	$(PYTHON) benchmarks/feedback.py
	$(PYTHON) benchmarks/offline.py
	$(PYTHON) benchmarks/log_length.py
	$(PYTHON) benchmarks/decision_client.py
	$(PYTHON) benchmarks/concurrency.py
	$(PYTHON) benchmarks/risk.py
	$(PYTHON) benchmarks/sets.py
	$(PYTHON) benchmarks/article.py
	$(PYTHON) benchmarks/tau_bench.py
	$(PYTHON) benchmarks/encoders.py
	$(PYTHON) benchmarks/speed.py
	$(PYTHON) benchmarks/training.py
	$(PYTHON) benchmarks/scaling.py
	$(PYTHON) benchmarks/scaling_ray.py

instructions: $(VENV)/installed  # needs valgrind
	$(PYTHON) benchmarks/instructions.py

$(VENV)/installed_for_demo: pyproject.toml constraints.txt
	test -e $(VENV)/installed || { python3 -m venv $(VENV) && \
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[offline,plots]'; }
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) demo_output
