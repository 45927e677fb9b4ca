"""The second call of the GPU suite, ``python -m benchmarks.gpu_suite --second``: 160 s on one GPU at most.

First what has to be right, side by side: every module of GPU tests, FP8, engines, tensor parallelism and the
model against its formulas. Then, one at a time on an idle GPU, what has to be fast. No GPU has run it yet.

Estimates in seconds (H100, not measured): 8 for the start and 50 for all that runs side by side, where compiling
kernels takes the most; decoder 12, attention 10, host time 20 under FSDP2 and 26 under ZeRO-3 (8 of each to build
the XXL model on the host), sampling 12, saving 12: 150 in all. The order is that of worth, should it not fit.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.jobs import CheckFailed, Found, Job, Where, pytest_job

BUDGET_S = 160.0
"""Of the whole call: the command on the GPU machine is ended after 165 s."""
SIDE_BY_SIDE_S = 55.0
"""Limit of everything that runs side by side: none of it may disturb the times that are measured afterwards."""
TESTS = ("tests/unit/test_triton_*.py", "tests/gpu/test_*.py")
SHARING = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "2", "GLOO_SOCKET_IFNAME": "lo"}
"""For processes that share the CPUs of one machine, which may have no network."""
PARITY = {"fp8": 35, "engines": 30, "tensor_parallel": 30, "twins": 20}
"""Checks that run beside the tests, and their estimates."""


def jobs(device: str) -> list[Job]:
    """All jobs of the call in order; whoever runs them decides whether sizes are small."""
    tests = [_tests(path, SIDE_BY_SIDE_S, selected=device == "cpu") for path in modules_of_tests()]
    checks = [
        Job(
            name,
            SIDE_BY_SIDE_S,
            function=f"benchmarks.gpu_parity:{name}",
            background=True,
            environment=SHARING,
            estimate_s=estimate,
        )
        for name, estimate in PARITY.items()
    ]
    names = [job.name for job in (*tests, *checks)]
    # A little longer than what it waits for.
    waiting = Job(
        "tests_ended",
        SIDE_BY_SIDE_S + 5,
        function="benchmarks.gpu_second:wait_for",
        options={"names": names},
        estimate_s=50,
    )
    gate = Job("gpu", 25, function="benchmarks.gpu_second:gpu", estimate_s=8, gate=True)
    return [gate, *tests, *checks, waiting, *_timed()]


def gpu(where: Where) -> Found:
    """Name and free memory of the GPU; without one, nothing after this runs."""
    if where.device == "cpu":
        return Found("a CPU, tiny models: this shows that the jobs run, and nothing about speed")
    import torch

    free, total = torch.cuda.mem_get_info()
    numbers = {"name": torch.cuda.get_device_name(), "free_bytes": free, "total_bytes": total}
    return Found(f"{numbers['name']}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free", numbers)


def modules_of_tests() -> list[Path]:
    """Every module of tests that a GPU should run, by its path in the project."""
    found = [path for pattern in TESTS for path in sorted(record.ROOT.glob(pattern))]
    return [path.relative_to(record.ROOT) for path in found]


def _tests(path: Path, limit_s: float, *, selected: bool) -> Job:
    """A module of tests; ``selected`` leaves those of arguments that are refused, which no kernel runs for."""
    words = ["-p", "benchmarks.stream_failures", str(path)]
    if selected and path.parts[1] == "unit":
        words += ["-k", "refused"]
    folder = "gpu_" if path.parts[1] == "gpu" else ""
    name = f"tests_{folder}{path.stem.removeprefix('test_')}"
    return pytest_job(
        name, limit_s, *words, background=True, environment=SHARING, estimate_s=40, missing_codes=(5,)
    )


def _timed() -> list[Job]:
    """What is timed, with limit and estimate in seconds; the GPU belongs to one at a time."""
    rows = [
        ("decoder", 25, 12, "benchmarks.gpu_rates:decoder", {}),
        ("attention", 25, 10, "benchmarks.gpu_parity:attention", {}),
        ("host_time_fsdp", 40, 20, "benchmarks.gpu_host_time:host_time", {"engine": "fsdp"}),
        ("host_time_zero3", 45, 26, "benchmarks.gpu_host_time:host_time", {"engine": "zero3"}),
        ("sampling", 30, 12, "benchmarks.gpu_rates:sampling", {}),
        ("saving", 30, 12, "benchmarks.gpu_rates:saving", {}),
    ]
    return [
        Job(name, limit, function=function, options=options, estimate_s=estimate)
        for name, limit, estimate, function, options in rows
    ]


def wait_for(where: Where, *, names: Sequence[str]) -> Found:
    """Return when the named jobs of this suite have their outcomes, so that nothing runs beside what is timed.

    A job that was not started (``--only``) is not waited for: it has no log.
    """
    began, suite = time.monotonic(), where.out.parent
    while True:
        missing = [n for n in names if (suite / f"{n}.log").exists() and not (suite / f"{n}.json").exists()]
        if not missing:
            return Found(f"{len(names)} jobs have ended after {time.monotonic() - began:.0f} s")
        if time.monotonic() - began > 3600:
            raise CheckFailed(f"still running after an hour: {', '.join(missing)}")
        time.sleep(0.2)
