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
    found = [Job("machine", 20, function="benchmarks.gpu_machine:machine", estimate_s=4, gate=True)]
    if device == "cuda":
        # While products and eager steps run, spare cores compile what the compiled steps will need.
        found += [
            _warm_up("warm_256", 256, 64, BF16),
            _warm_up("warm_torchao", 256, 64, torchao),
            _warm_up("warm_512", 512, 16, BF16),
        ]
    found += [
        Job("gemm", 15, function="benchmarks.gpu_gemm:gemm", estimate_s=6),
        _steps(
            "xxl_256", 65, 45, BF16,
            variants=[
                {"name": "straightforward", "micro_batch": 32, "compile": False, "straightforward": True},
                {"name": "eager", "micro_batch": 64, "compile": False},
                {"name": "compiled", "micro_batch": 64},
                {"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4},
            ],
            trace=True,
        ),
        _steps(
            "xxl_256_fsdp", 35, 30, BF16, engine="fsdp",
            variants=[{"name": "compiled_accumulation_4", "micro_batch": 64, "accumulation": 4}],
        ),
        _steps("xxl_512", 30, 20, BF16, resolution=512, variants=[{"name": "compiled", "micro_batch": 16}]),
        _steps("fp8_torchao", 30, 25, torchao, variants=[{"name": "compiled", "micro_batch": 64}]),
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
        function="benchmarks.gpu_steps:steps",
        options=options,
        estimate_s=estimate_s,
        may_take_what_is_left=True,
    )


def _warm_up(name: str, resolution: int, micro_batch: int, precision: dict[str, object]) -> Job:
    options = {"resolution": resolution, "micro_batch": micro_batch, "precision": precision}
    return Job(
        name,
        60,
        function="benchmarks.gpu_steps:warm_up",
        options=options,
        estimate_s=25,
        background=True,
    )
