"""``deco-ckpt reshard`` against DeepSpeed itself: what it loads and saves again has every bit."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_tools.base import CheckpointReader, TensorSpec
from checkpoints_tools.formats.canonical import CanonicalReader, write_canonical
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.infer_config import denoiser_shapes, repa_shapes
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import plan_reshard
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.models import ModelConfig
from deco_scale.models.stored_names import to_stored
from tests.support.process_groups import in_group

# 5 text tokens and 30 text features: neither divides by four.
MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=1, num_text_blocks=1, patch_size=8, decoder_width=8,
    decoder_blocks=1, text_dim=30, text_tokens=5,
)  # fmt: skip
ENCODER_DIM = 6
META = CheckpointMeta(
    step=7, stage="a", samples=70, seed=0, optimizer_steps=6, data_state={"at": 70}, parameter_digest="", config={}
)


def make_canonical(folder: Path) -> CanonicalReader:
    """A checkpoint of random tensors."""
    weights = {f"denoiser.{n}": s for n, s in denoiser_shapes(MODEL).items()}
    head = {f"repa_head.{n}": s for n, s in repa_shapes(MODEL.dim, ENCODER_DIM).items()}
    shapes = {f"{kind}.{n}": s for kind in ("model", "exp_avg", "exp_avg_sq") for n, s in (weights | head).items()}
    shapes |= {f"ema.{n}": s for n, s in weights.items()}
    generator = torch.Generator().manual_seed(3)
    tensors = {name: torch.rand(shape, generator=generator) for name, shape in sorted(shapes.items())}
    write_canonical(folder, {n: TensorSpec(s) for n, s in shapes.items()}, tensors.__getitem__, META)
    return CanonicalReader(folder)


def check_equal(found: CheckpointReader, wanted: CheckpointReader, *, ema: bool) -> None:
    names = [n for n in wanted.specs if ema or not n.startswith("ema.")]
    assert sorted(names) == sorted(found.specs)
    for name in names:
        assert torch.equal(found.read(name), wanted.read(name)), f"{found.path}: {name}"


def _plain(stage: int, *, bf16: bool = False, universal: bool = False) -> Any:
    """An engine of somebody else's script: our model, PyTorch's optimizer, DeepSpeed's settings."""
    from deco_scale.models import Denoiser
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.parallel.engines.deepspeed_config import import_deepspeed

    deepspeed = import_deepspeed(torch.device("cpu"))
    deepspeed.utils.groups.mpu = None
    objective = Objective(Denoiser(MODEL), ObjectiveConfig(repa_layer=1), encoder_dim=ENCODER_DIM)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16},
        "checkpoint": {"load_universal": universal},
    }
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3)
    return deepspeed.initialize(model=objective, optimizer=optimizer, config=config)[0]


def _ours(stage: int, tp: int) -> Any:
    """The DeepSpeed engine inside of our engine, with Megatron's layers."""
    from deco_scale.models import Denoiser
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.optim.config import OptimizerConfig
    from deco_scale.parallel.engines.base import EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.mesh import ParallelDims
    from deco_scale.precision.config import PrecisionConfig

    engine = DeepSpeedEngine(
        lambda: Objective(Denoiser(MODEL), ObjectiveConfig(repa_layer=1), encoder_dim=ENCODER_DIM),
        EngineSettings(
            dims=ParallelDims(1, dist.get_world_size() // tp, tp),
            device=torch.device("cpu"),
            optimizer=OptimizerConfig(ema_decay=0.9),
            precision=PrecisionConfig(compute="fp32"),
            zero_stage=stage,
        ),
    )
    return engine._engine


def _through_deepspeed(root: str, cases: list[str]) -> None:
    """Load each case with a fresh engine, compare the weights that it computes with, and save it again."""
    wanted = CanonicalReader(Path(root) / "canonical")
    for case in cases:
        kind, stage, tp = case.split("_")[0], int(case.split("_")[1]), int(case.split("_")[2])
        plain = {"bf16": kind == "bf16", "universal": kind == "universal"}
        engine = _ours(stage, tp) if tp > 1 else _plain(stage, **plain)
        source = "universal" if kind == "universal" else case
        loaded, _ = engine.load_checkpoint(str(Path(root) / source))
        assert loaded is not None and engine.global_steps == META.step
        if tp == 1:
            _check_computing(engine, wanted, stage)
        engine.save_checkpoint(str(Path(root) / f"{case}_again"), tag="again")
        dist.barrier()


def _check_computing(engine: Any, wanted: CheckpointReader, stage: int) -> None:
    import deepspeed

    parameters: dict[str, Tensor] = dict(engine.module.named_parameters())
    whole: Any = contextlib.nullcontext()
    if stage == 3:
        whole = deepspeed.zero.GatheredParameters(list(parameters.values()))
    with whole:
        for name, found in to_stored(parameters).items():
            value = wanted.read(f"model.{name}").to(found.dtype)
            assert torch.equal(found.detach(), value), name


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, ["fp32_1_1", "bf16_2_1", "fp32_3_1", "fp32_1_2"]),
        (4, ["universal_1_1", "universal_3_1"]),
        pytest.param(4, ["fp32_2_1", "fp32_3_2"], marks=pytest.mark.long),
    ],
)
def test_deepspeed_loads_and_saves_every_bit(world: int, cases: list[str], tmp_path: Path) -> None:
    wanted = make_canonical(tmp_path / "canonical")
    for case in cases:
        kind, stage, tp = case.split("_")[0], int(case.split("_")[1]), int(case.split("_")[2])
        if kind != "universal":
            layout = ZeroLayout(dp=world // tp, tp=tp, stage=stage, bf16=kind == "bf16")
            plan_reshard(wanted, to="deepspeed", layout=layout).write(tmp_path / case, lambda name: None)
            check_equal(open_checkpoint(tmp_path / case), wanted, ema=True)
    plan_reshard(wanted, to="universal").write(tmp_path / "universal", lambda name: None)
    in_group(_through_deepspeed, world, tmp_path, str(tmp_path), cases)
    for case in cases:
        again = open_checkpoint(tmp_path / f"{case}_again")
        assert again.progress.step == META.step  # type: ignore[attr-defined]
        check_equal(again, wanted, ema=False)
        plan_reshard(again, to="canonical", ema_from_model=True).write(
            tmp_path / f"{case}_back", lambda name: None
        )
        back = CanonicalReader(tmp_path / f"{case}_back")
        carried = [n for n in back.specs if not n.startswith("ema.")]
        assert all(torch.equal(back.read(n), wanted.read(n)) for n in carried)
        stood = (back.meta.step, back.meta.samples, back.meta.optimizer_steps)
        assert stood == (META.step, META.samples, META.optimizer_steps)
