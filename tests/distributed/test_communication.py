"""A step sends what the plan says: collectives of a real step are counted by kind and bytes."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.config import ParallelConfig, ReduceDtype, ZeroStage
from deco_scale.parallel.engines.base import Engine, EngineSettings
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.comms import Traffic, step_traffic
from deco_scale.planning.flops import TrainStep, Workload
from deco_scale.precision.config import Compute, PrecisionConfig
from tests.support.process_groups import in_group

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=12, text_tokens=5,
)  # fmt: skip
COMPUTES: tuple[Compute, ...] = ("fp32", "bf16")
FSDP_CASES: tuple[tuple[Compute, bool, ReduceDtype], ...] = (
    ("fp32", True, "fp32"), ("bf16", True, "fp32"), ("bf16", False, "bf16"),
)  # fmt: skip
"""Compute type, reshard_after_forward, reduce_dtype."""
PERSISTENT = 1000
ZERO3_SETTINGS = {"stage3_param_persistence_threshold": PERSISTENT, "stage3_prefetch_bucket_size": 0}
"""Without prefetch, of which a bucket would be larger than this model."""
SCALAR_BYTES = 8
"""Norms are not part of the plan."""


LOCAL = ("wait_tensor", "_wrap_tensor_autograd")
"""Functions of the same libraries that send nothing."""


def _group_size(args: Any) -> int:
    if isinstance(args[-1], str):
        return dist.distributed_c10d._resolve_process_group(args[-1]).size()
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.ProcessGroup.unbox(arg).size()
    return dist.get_world_size()


def _is_bf16(thing: Any) -> bool:
    """Whether the first tensor in it is."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype == torch.bfloat16
    return isinstance(thing, list | tuple) and len(thing) > 0 and _is_bf16(thing[0])


class Counting(TorchDispatchMode):
    """Adds up the bytes of collectives as they are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name

        def size(thing: Any) -> int:
            if isinstance(thing, torch.Tensor):
                return thing.numel() * thing.element_size()
            return sum(size(t) for t in thing)

        kind, amount = None, 0
        if name == "c10d::_allgather_base_":
            kind, amount = "all-gather", size(args[0])
        elif name == "c10d::_reduce_scatter_base_":
            kind, amount = "reduce-scatter", size(args[1])
        elif name == "_c10d_functional::all_gather_into_tensor":
            kind, amount = "all-gather", size(args[0]) * args[1]
        elif name == "_c10d_functional::reduce_scatter_tensor":
            kind, amount = "reduce-scatter", size(args[0])
        elif name in ("c10d::allreduce_", "_c10d_functional::all_reduce", "_c10d_functional::all_reduce_"):
            kind, amount = "all-reduce", size(args[0])
        elif name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(LOCAL):
            kind, amount = name, 1 << 40
        # A group of one rank sends nothing; norms are fp32, the smallest bias in bf16 is no larger.
        if kind and (amount > SCALAR_BYTES or _is_bf16(args)) and _group_size(args) > 1:
            self.bytes[kind] += amount
        return func(*args, **(kwargs or {}))


def _planned_step(compute: Compute, dims: ParallelDims, **parallel: Any) -> TrainStep:
    work = Workload(model=MODEL, compute=compute, persistent=PERSISTENT)
    settings = ParallelConfig(tp=dims.tp, **parallel)
    return TrainStep(work=work, parallel=settings, dims=dims, micro_batch=2, accumulation=2, resolution=24)


def _inputs() -> ObjectiveInputs:
    image = torch.randn(2, 3, 24, 24)
    return ObjectiveInputs(image, image, torch.rand(2), torch.randn(2, 5, 12), None)


def _step(engine: Engine) -> None:
    for last in (False, True):
        engine.forward_backward(_inputs(), scale=0.5, last=last)
    engine.update(lr=1e-3, betas=(0.9, 0.95))


def _build() -> Objective:
    return Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)


def _count_fsdp(replicate: int, shard: int, tp: int, out: str) -> None:
    from deco_scale.parallel.engines.fsdp import FsdpEngine

    counts = []
    for compute, reshard, reduce_dtype in FSDP_CASES:
        engine = FsdpEngine(
            _build,
            EngineSettings(
                dims=ParallelDims(replicate, shard, tp),
                device=torch.device("cpu"),
                optimizer=OptimizerConfig(),
                precision=PrecisionConfig(compute=compute),
                reshard_after_forward=reshard,
                reduce_dtype=reduce_dtype,
            ),
        )
        with Counting() as counting:
            _step(engine)
        counts.append(counting.bytes)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counts))


def _count_zero(dp: int, tp: int, settings: list[tuple[ZeroStage, Compute, bool]], out: str) -> None:
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

    counts = []
    for stage, compute, reshard in settings:
        engine = DeepSpeedEngine(
            _build,
            EngineSettings(
                dims=ParallelDims(1, dp, tp),
                device=torch.device("cpu"),
                optimizer=OptimizerConfig(),
                precision=PrecisionConfig(compute=compute),
                zero_stage=stage,
                reshard_after_forward=reshard,
                micro_batch=2,
                overrides={"zero_optimization": ZERO3_SETTINGS},
            ),
        )
        # ZeRO-3 records the order of its first step.
        _step(engine)
        with Counting() as counting:
            _step(engine)
        counts.append(counting.bytes)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counts))


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param((1, 2, 1), marks=pytest.mark.long),
        pytest.param((1, 1, 2), marks=pytest.mark.long),
        (1, 2, 2),
        (2, 2, 1),
    ],
    ids=lambda m: "x".join(map(str, m)),
)
def test_bytes_of_a_step_are_those_of_the_plan(mesh: tuple[int, int, int], tmp_path: Path) -> None:
    out = tmp_path / "count.json"
    in_group(_count_fsdp, mesh[0] * mesh[1] * mesh[2], tmp_path, *mesh, str(out))
    for (compute, reshard, dtype), counted in zip(FSDP_CASES, json.loads(out.read_text()), strict=True):
        settings = {"engine": "fsdp", "reshard_after_forward": reshard, "reduce_dtype": dtype}
        planned = _total(step_traffic(_planned_step(compute, ParallelDims(*mesh), **settings)))
        print(mesh, compute, reshard, dtype, counted, dict(planned))
        assert Counter(counted) == planned


@pytest.mark.parametrize(
    "mesh",
    [pytest.param((2, 1), marks=pytest.mark.long), (1, 2), pytest.param((2, 2), marks=pytest.mark.long)],
    ids=lambda m: "x".join(map(str, m)),
)
def test_bytes_of_a_deepspeed_step_are_those_of_the_plan(mesh: tuple[int, int], tmp_path: Path) -> None:
    out = tmp_path / "count.json"
    dp, tp = mesh
    stages: list[ZeroStage] = [0, 1, 2, 3] if tp == 1 else [1, 2, 3]
    settings = [(stage, compute, True) for compute in COMPUTES for stage in stages] + [(3, "bf16", False)]
    # ZeRO-3 replaces F.linear for the process, so it comes last; its bytes do not depend on that.
    settings.sort(key=lambda s: s[0])
    in_group(_count_zero, dp * tp, tmp_path, dp, tp, settings, str(out))
    wrong = []
    for (stage, compute, reshard), counted in zip(settings, json.loads(out.read_text()), strict=True):
        dims = ParallelDims(1, dp, tp)
        step = _planned_step(compute, dims, engine="deepspeed", zero_stage=stage, reshard_after_forward=reshard)
        planned = _total(step_traffic(step))
        print(f"ZeRO-{stage} {dp}x{tp} {compute} reshard {reshard}", counted, dict(planned))
        if Counter(counted) != planned:
            wrong.append((stage, compute, reshard))
    assert not wrong


def _total(lines: Iterable[Traffic]) -> Counter[str]:
    total: Counter[str] = Counter()
    for line in lines:
        total[line.kind] += line.bytes
    return total
