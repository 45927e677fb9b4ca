"""The GPU suite's first call: the speed figures that decide most, in an order that makes the first minute count.

The estimates are those of the review of 2026-11 by reading and arithmetic; no GPU has run these jobs yet.
"""

from benchmarks.jobs import Job

BUDGET_S = 250.0
"""Of the whole call: the command on the GPU machine is ended after 260 s."""
BF16 = {"compute": "bf16"}
TORCHAO = {"compute": "fp8", "fp8_backend": "torchao"}
TE = {"compute": "fp8", "fp8_backend": "te"}


def jobs(device: str) -> list[Job]:
    """Jobs in their order; on a CPU torchao's FP8 is emulated. Quick or not is decided by whoever runs them."""
    torchao = TORCHAO | ({"fp8_emulate": True} if device == "cpu" else {})
    found = [Job("machine", 15, function="benchmarks.gpu_machine:machine", estimate_s=4, gate=True)]
    # Every job would start with this race otherwise, and load what it needs.
    race = {"sizes": [[256, 64], [512, 16]]}
    found.append(Job("attention", 25, function="benchmarks.gpu_steps:attention", options=race, estimate_s=12))
    if device == "cuda":
        found.append(_warm_up())
    found += [
        Job("gemm", 12, function="benchmarks.gpu_gemm:gemm", estimate_s=6),
        _steps(
            "xxl_256", 60, 55, BF16,
            variants=[
                {"name": "straightforward", "micro_batch": 32, "compile": False, "straightforward": True},
                {"name": "eager", "micro_batch": 64, "compile": False},
                {"name": "compiled", "micro_batch": 64},
                {"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4},
                {"name": "compiled_static", "micro_batch": 64, "static_shapes": True},
            ],
            trace="compiled_accumulation_4",
        ),
        _steps(
            "xxl_256_fsdp", 30, 28, BF16, engine="fsdp",
            variants=[{"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4}],
        ),
        _steps("xxl_512", 25, 16, BF16, resolution=512, variants=[{"name": "compiled", "micro_batch": 16}]),
        _steps("fp8_torchao", 28, 20, torchao, variants=[{"name": "compiled", "micro_batch": 64}]),
        _steps("fp8_te", 30, 25, TE, variants=[{"name": "compiled", "micro_batch": 64}]),
    ]  # fmt: skip
    encoders = "benchmarks.gpu_encoders:encoders"
    return [*found, Job("encoders", 25, function=encoders, estimate_s=20, may_take_what_is_left=True)]


def _steps(
    name: str,
    limit_s: float,
    estimate_s: float,
    precision: dict[str, object],
    *,
    variants: list[dict[str, object]],
    resolution: int = 256,
    engine: str = "none",
    trace: str | None = None,
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
        function="benchmarks.gpu_steps:steps",
        options=options,
        estimate_s=estimate_s,
        may_take_what_is_left=True,
    )


def _warm_up() -> Job:
    """While products and eager steps run, spare cores compile what the compiled steps will need, soonest first."""
    cases = [
        {"resolution": 256, "variant": {"name": "bf16_256", "micro_batch": 64}},
        {"resolution": 256, "variant": {"name": "bf16_256_static", "micro_batch": 64, "static_shapes": True}},
        {"resolution": 512, "variant": {"name": "bf16_512", "micro_batch": 16}},
        {"resolution": 256, "variant": {"name": "torchao_256", "micro_batch": 64}, "precision": TORCHAO},
    ]
    function = "benchmarks.gpu_steps:warm_up"
    return Job("warm_up", 100, function=function, options={"cases": cases}, estimate_s=60, background=True)
