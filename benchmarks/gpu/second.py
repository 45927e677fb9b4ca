"""The second call of the GPU suite, ``python -m benchmarks.gpu_suite --second``: 160 s on one GPU at most.

First correctness, side by side: every module of GPU tests, FP8, engines, tensor parallelism, and the model
against the eager reference. Then speed, one job at a time on an idle GPU. No GPU has run it yet.

Estimates in seconds (H100, not measured): 8 for the start and 50 for all that runs side by side, where compiling
kernels takes the most; decoder 12, attention 10, host time 20 under FSDP2 and 26 under ZeRO-3 (8 of each to build
the XXL model on the host), sampling 12, saving 12: 150 in all. The most valuable jobs come first, in case time
runs out.
"""

from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.jobs.runner import Job, pytest_job

BUDGET_S = 160.0
"""Of the whole call: the command on the GPU machine is ended after 165 s."""
SIDE_BY_SIDE_S = 55.0
"""Limit of everything that runs side by side: none of it may disturb the times that are measured afterwards."""
SPLIT = {"tests/gpu/test_engines.py": "zero3"}
"""Modules that take too long as one job: tests with the word in their names are a job of their own."""
TESTS = ("tests/unit/**/test_triton_*.py", "tests/gpu/test_*.py")
SHARING = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo"}
"""For processes that share the CPUs of one machine, which may have no network."""
PARITY = {"fp8": 35, "engines": 30, "tensor_parallel": 30, "twins": 20}
"""Checks that run beside the tests, and their estimates."""


def jobs(device: str) -> list[Job]:
    """All jobs of the call in order; whoever runs them decides whether sizes are small."""
    tests = []
    for path in modules_of_tests():
        word = SPLIT.get(str(path))
        if word is None:
            tests.append(_tests(path, selected=device == "cpu"))
        else:
            tests += [_tests(path, named=word), _tests(path, named=f"not {word}")]
    checks = [
        Job(
            name,
            SIDE_BY_SIDE_S,
            function=f"benchmarks.gpu.parity:{name}",
            background=True,
            environment=SHARING,
            estimate_s=estimate,
        )
        for name, estimate in PARITY.items()
    ]
    gate = Job("gpu", 25, function="benchmarks.gpu.machine:machine", estimate_s=8, gate=True)
    return [gate, *tests, *checks, *_timed()]


def modules_of_tests() -> list[Path]:
    """Every module of tests that a GPU should run, by its path in the project."""
    found = [path for pattern in TESTS for path in sorted(record.ROOT.glob(pattern))]
    return [path.relative_to(record.ROOT) for path in found]


def _tests(path: Path, *, selected: bool = False, named: str = "") -> Job:
    """A module of tests, or those of it that ``named`` selects (``-k``).

    ``selected`` leaves those of arguments that are refused, which no kernel runs for.
    """
    words = ["-p", "benchmarks.jobs.stream_failures", str(path)]
    if selected and path.parts[1] == "unit":
        words += ["-k", "refused"]
    if named:
        words += ["-k", named]
    folder = "gpu_" if path.parts[1] == "gpu" else ""
    name = f"tests_{folder}{path.stem.removeprefix('test_')}{'_' if named else ''}{named.replace(' ', '_')}"
    return pytest_job(
        name, SIDE_BY_SIDE_S, *words, background=True, environment=SHARING, estimate_s=50, missing_codes=(5,)
    )


def _timed() -> list[Job]:
    """What is timed, with limit and estimate in seconds; the GPU belongs to one at a time."""
    rows: list[tuple[str, float, float, str, dict[str, Any]]] = [
        ("decoder", 25, 12, "benchmarks.gpu.rates:decoder", {}),
        ("attention", 25, 10, "benchmarks.gpu.attention:attention", {"sizes": [[256, 64], [512, 16]]}),
        ("host_time_fsdp", 40, 20, "benchmarks.gpu.host_time:host_time", {"engine": "fsdp"}),
        ("host_time_zero3", 45, 26, "benchmarks.gpu.host_time:host_time", {"engine": "zero3"}),
        ("sampling", 30, 12, "benchmarks.gpu.rates:sampling", {}),
        ("saving", 30, 12, "benchmarks.gpu.rates:saving", {}),
    ]
    return [
        Job(name, limit, function=function, options=options, estimate_s=estimate, alone=True)
        for name, limit, estimate, function, options in rows
    ]
