"""A canonical checkpoint moves between layouts and engines and back without a changed bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.support.process_groups import in_group

LAYOUTS: dict[str, tuple[int, int, int, int | None]] = {
    "fsdp 2x2": (1, 2, 2, None),
    "fsdp 4x1": (1, 4, 1, None),
    "hsdp 2x1x2": (2, 1, 2, None),
    "hsdp 2x2x1": (2, 2, 1, None),
    "zero1 2x2": (1, 2, 2, 1),
    "zero2 1x4": (1, 1, 4, 2),
    "zero0 4x1": (1, 4, 1, 0),
    "zero3 4x1": (1, 4, 1, 3),
    "zero3 2x2": (1, 2, 2, 3),
}
"""dp_replicate, dp_shard, tp, and the ZeRO stage, None for fsdp."""


SHORT = {"fsdp 2x2": ("zero1 2x2", "hsdp 2x1x2", "zero3 4x1"), "zero3 2x2": ("fsdp 4x1",)}
"""Origins and where they go in the short test."""


def _visit(root: str, ways: dict[str, tuple[str, ...]]) -> None:
    from deco_scale.checkpoint.config import CheckpointConfig
    from deco_scale.checkpoint.format import CheckpointMeta, read_tensors
    from deco_scale.checkpoint.manager import CheckpointManager
    from deco_scale.models import Denoiser, ModelConfig
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.objectives.objective import ObjectiveInputs
    from deco_scale.optim.config import OptimizerConfig
    from deco_scale.parallel.engines.base import Engine, EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.engines.fsdp import FsdpEngine
    from deco_scale.parallel.mesh import ParallelDims
    from deco_scale.precision.config import PrecisionConfig
    from tests.support import saving

    # 9 image tokens, 5 text tokens and 30 text features: none divides by four.
    model = ModelConfig(
        kind="t2i_deco", dim=32, num_heads=4, num_blocks=1, num_text_blocks=1, patch_size=8, decoder_width=8,
        decoder_blocks=1, text_dim=30, text_tokens=5,
    )  # fmt: skip

    def build() -> Objective:
        return Objective(Denoiser(model), ObjectiveConfig(repa_layer=1), encoder_dim=6)

    def engine_of(name: str) -> Engine:
        replicate, shard, tp, stage = LAYOUTS[name]
        settings = EngineSettings(
            dims=ParallelDims(replicate, shard, tp), device=torch.device("cpu"), micro_batch=2,
            optimizer=OptimizerConfig(ema_decay=0.9), precision=PrecisionConfig(compute="fp32"),
            zero_stage=3 if stage is None else stage,
        )  # fmt: skip
        return (FsdpEngine if stage is None else DeepSpeedEngine)(build, settings)

    def store(name: str) -> CheckpointManager:
        return CheckpointManager(Path(root) / name.replace(" ", "_"), CheckpointConfig())

    def save(engine: Engine, name: str) -> Path | str:
        checkpoints = store(name)
        checkpoints.prepare()
        dist.barrier()
        meta = CheckpointMeta(
            step=1, stage="a", samples=8, optimizer_steps=engine.optimizer_steps, seed=0, config={},
            data_state={}, parameter_digest="",
        )  # fmt: skip
        return saving.save(checkpoints, engine, meta)

    def check_equal(path: Path, wanted: dict[str, torch.Tensor], what: str) -> None:
        if dist.get_rank() == 0:
            found = read_tensors(path, "")
            assert found.keys() == wanted.keys(), what
            for key, tensor in wanted.items():
                assert torch.equal(found[key], tensor), f"{what}: {key}"
        dist.barrier()

    for origin, others in ways.items():
        engine = engine_of(origin)
        generator = torch.Generator().manual_seed(1)
        image = torch.randn(2, 3, 24, 24, generator=generator)
        inputs = ObjectiveInputs(
            image, image.flip(0), torch.rand(2, generator=generator),
            torch.randn(2, 5, 30, generator=generator), torch.randn(2, 9, 6, generator=generator),
        )  # fmt: skip
        for _ in range(3):
            engine.forward_backward(inputs, scale=1.0, last=True)
            engine.update(lr=1e-2, betas=(0.9, 0.95))
        first = save(engine, f"{origin} first")
        wanted = read_tensors(first, "")
        for name in others:
            there = engine_of(name)
            store(name).load(there, first)
            assert there.optimizer_steps == 3
            second = save(there, f"{origin} to {name}")
            check_equal(second, wanted, f"{origin} to {name}")
            back = engine_of(origin)
            store(origin).load(back, second)
            check_equal(save(back, f"{origin} to {name} and back"), wanted, f"{origin} to {name} and back")


def _all_ways() -> list[Any]:
    """Every layout from either origin, three to a process group: engines leave their groups' threads behind."""
    names = list(LAYOUTS)
    return [
        pytest.param({origin: tuple(names[i : i + 3])}, id=f"{origin}, {i}", marks=pytest.mark.long)
        for origin in SHORT
        for i in range(0, len(names), 3)
    ]


@pytest.mark.parametrize("ways", [pytest.param(SHORT, id="some"), *_all_ways()])
def test_layouts_and_engines_keep_every_bit(ways: dict[str, tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    in_group(_visit, 4, tmp_path, str(tmp_path / "checkpoints"), ways)
