"""A step sends what the plan says: collectives of a real step are counted by kind and bytes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from deco_scale.models import ModelConfig
from deco_scale.parallel.layout import Layout
from deco_scale.planning.communication import StepShape, fsdp_traffic
from tests.distributed.harness import in_group

MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=12, text_tokens=5,
)  # fmt: skip
SCALAR_BYTES = 4
"""The gradient norm is not part of the plan."""


LOCAL = ("wait_tensor", "_wrap_tensor_autograd")
"""Functions of the same libraries that send nothing."""


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
        elif name in ("c10d::allreduce_", "_c10d_functional::all_reduce", "_c10d_functional::all_reduce_"):
            kind, amount = "all-reduce", size(args[0])
        elif name.startswith(("c10d::", "_c10d_functional::")) and not name.endswith(LOCAL):
            kind, amount = name, 1 << 40
        if kind and amount > SCALAR_BYTES:
            self.bytes[kind] += amount
        return func(*args, **(kwargs or {}))


def _count(replicate: int, shard: int, tp: int, out: str) -> None:
    from deco_scale.models import Denoiser
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.parallel.fsdp import FsdpEngine
    from deco_scale.precision import PrecisionConfig
    from deco_scale.training.batch import ObjectiveInputs
    from deco_scale.training.settings import OptimizerConfig

    engine = FsdpEngine(
        lambda: Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0),
        layout=Layout(replicate, shard, tp), device=torch.device("cpu"), optimizer=OptimizerConfig(),
        precision=PrecisionConfig(compute="fp32"), compile_blocks=False, recompute="none", seed=0,
    )  # fmt: skip
    image = torch.randn(2, 3, 24, 24)
    inputs = ObjectiveInputs(image, image, torch.rand(2), torch.randn(2, 5, 12), None)
    with Counting() as counting:
        for last in (False, True):
            engine.forward_backward(inputs, scale=0.5, last=last)
        engine.update(lr=1e-3, betas=(0.9, 0.95))
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(counting.bytes))


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1)], ids=lambda m: "x".join(map(str, m)))
def test_bytes_of_a_step_are_those_of_the_plan(mesh: tuple[int, int, int], tmp_path: Path) -> None:
    out = tmp_path / "count.json"
    in_group(_count, mesh[0] * mesh[1] * mesh[2], tmp_path, *mesh, str(out))
    shape = StepShape(micro_batch=2, accumulation=2, tokens=9, compute_bytes=4)
    planned: Counter[str] = Counter()
    for line in fsdp_traffic(MODEL, Layout(*mesh), shape):
        planned[line.kind] += line.bytes
    found = Counter(json.loads(out.read_text()))
    print(mesh, dict(found), dict(planned))
    assert found == planned
