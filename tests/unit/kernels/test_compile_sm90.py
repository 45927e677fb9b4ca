"""Every Triton kernel, compiled for an H100 as a training step of the released models would launch it.

By Triton's compiler, without a GPU and in a process of its own: here kernels are interpreted. Registers, spills
and shared memory are what the machine code says; how fast it is, no test says.
"""

import ast
import json
import os
import subprocess
import sys
import warnings
from typing import Any

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

import triton

from benchmarks.kernels.compile import FILE, SHARED_LIMIT
from benchmarks.record import RESULTS, ROOT

REWRITE = "python -m benchmarks.kernels --compile-only --out benchmarks/results"

pytestmark = pytest.mark.slow


def table() -> dict[str, Any]:
    versions: dict[str, Any] = json.loads((RESULTS / FILE).read_text())
    return versions


def launched_kernels() -> set[str]:
    """Module and name of whatever the product launches: ``kernel[grid](...)``."""
    found = set()
    for path in (ROOT / "deco_scale" / "kernels" / "triton").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.add(f"{path.stem} {ast.unparse(node.func.value).strip('_')}")
    return found


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Figures of each kernel by the installed version of Triton."""
    out = tmp_path_factory.mktemp("sm90")
    command = [sys.executable, "-m", "benchmarks.kernels", "--compile-only", "--out", str(out)]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, dict[str, int]] = json.loads((out / FILE).read_text())[triton.__version__]["kernels"]
    return found


def test_every_kernel_compiles_and_fits_the_shared_memory_of_an_h100(compiled: dict[str, dict[str, int]]) -> None:
    assert {" ".join(name.split()[:2]) for name in compiled} == launched_kernels()
    for name, figures in compiled.items():
        assert figures["shared_bytes"] <= SHARED_LIMIT, name
        assert 0 < figures["registers"] <= 255, name


def test_no_kernel_spills_more_than_the_committed_table_says(compiled: dict[str, dict[str, int]]) -> None:
    if triton.__version__ not in table():
        warnings.warn(f"spills of Triton {triton.__version__} are not in {FILE}: {REWRITE}", stacklevel=1)
        pytest.skip(f"no figures of Triton {triton.__version__} in benchmarks/results/{FILE}")
    known = table()[triton.__version__]["kernels"]
    assert compiled.keys() == known.keys(), f"other kernels than in {FILE}; {REWRITE}"
    more = {n: f["stack_bytes"] for n, f in compiled.items() if f["stack_bytes"] > known[n]["stack_bytes"]}
    assert not more, f"more bytes of stack a thread than in {FILE}; if that is meant: {REWRITE}"


def test_committed_table_has_the_oldest_and_the_newest_triton_and_fits_an_h100() -> None:
    versions = table()
    assert {"3.6.0", "3.9.0"} <= versions.keys()
    for version, found in versions.items():
        for name, figures in found["kernels"].items():
            assert figures["shared_bytes"] <= SHARED_LIMIT, (version, name)
