"""The GPU suite's first call: the speed figures that decide most, in an order that makes the first minute count.

The estimates are those of the review of 2026-11 by reading and arithmetic; no GPU has run these jobs yet.
"""

from typing import Any

from benchmarks.jobs.runner import Job

BUDGET_S = 250.0
"""Of the whole call: the command on the GPU machine is ended after 260 s."""
WARM_UP_S = 36.0
"""Limit of compiling ahead; what it has compiled by then is in the caches."""
BF16 = {"compute": "bf16"}
TORCHAO = {"compute": "fp8", "fp8_backend": "torchao"}
TE = {"compute": "fp8", "fp8_backend": "te"}


def jobs(device: str) -> list[Job]:
    """Jobs in their order; on a CPU torchao's FP8 is emulated. Quick or not is decided by whoever runs them."""
    torchao = TORCHAO | ({"fp8_emulate": True} if device == "cpu" else {})
    race = {"sizes": [[256, 64], [512, 16]]}
    encoders = "benchmarks.gpu.encoders:encoders"
    return [
        Job("machine", 20, function="benchmarks.gpu.machine:machine", estimate_s=4, gate=True),
        # Every job would start with this race otherwise, and load what it needs.
        Job("attention", 22, function="benchmarks.gpu.attention:attention", options=race, estimate_s=12),
        Job("gemm", 10, function="benchmarks.gpu.gemm:gemm", estimate_s=6),
        *_warm_up(torchao),
        _steps(
            "xxl_256", 48, 45, BF16,
            variants=[
                {"name": "straightforward", "micro_batch": 32, "compile": False, "straightforward": True},
                {"name": "eager", "micro_batch": 64, "compile": False},
                {"name": "compiled", "micro_batch": 64},
                {"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4},
            ],
            trace=True,
        ),
        _steps(
            "xxl_256_fsdp", 30, 28, BF16, engine="fsdp",
            variants=[{"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4}],
        ),
        _steps("xxl_512", 18, 14, BF16, resolution=512, variants=[{"name": "compiled", "micro_batch": 16}]),
        _steps("fp8_torchao", 20, 18, torchao, variants=[{"name": "compiled", "micro_batch": 64}]),
        _steps("fp8_te", 22, 20, TE, variants=[{"name": "compiled", "micro_batch": 64}]),
        Job("encoders", 20, function=encoders, estimate_s=20, alone=True, may_take_what_is_left=True),
    ]  # fmt: skip


def _steps(
    name: str,
    limit_s: float,
    estimate_s: float,
    precision: dict[str, Any],
    *,
    variants: list[dict[str, Any]],
    resolution: int = 256,
    engine: str = "none",
    trace: bool = False,
) -> Job:
    options = {
        "resolution": resolution,
        "variants": variants,
        "engine": engine,
        "precision": precision,
        "trace": trace,
    }
    return Job(
        name,
        limit_s,
        function="benchmarks.gpu.steps:steps",
        options=options,
        estimate_s=estimate_s,
        alone=True,
        may_take_what_is_left=True,
    )


def _warm_up(torchao: dict[str, Any]) -> list[Job]:
    """All graphs of the call are compiled side by side, on cores that would idle, before anything is timed."""
    cases = [
        ("bf16_256", 256, BF16, 64, "none"),
        ("fsdp_256", 256, BF16, 64, "fsdp"),
        ("bf16_512", 512, BF16, 16, "none"),
        ("torchao_256", 256, torchao, 64, "none"),
        ("te_256", 256, TE, 64, "none"),
    ]
    return [
        Job(
            f"warm_up_{name}",
            WARM_UP_S,
            function="benchmarks.gpu.steps:warm_up",
            options={
                "resolution": resolution,
                "precision": precision,
                "variant": {"name": name, "micro_batch": micro_batch},
                "engine": engine,
            },
            estimate_s=30,
            background=True,
        )
        for name, resolution, precision, micro_batch, engine in cases
    ]
