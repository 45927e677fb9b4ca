"""Model state per rank falls with the number of ranks, measured by the tensors that exist."""

import gc
import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from checkpoints_tools.base import TensorSpec
from checkpoints_tools.formats.canonical import write_canonical
from checkpoints_tools.infer_config import denoiser_shapes
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.planning.memory import state_copies
from tests.support.process_groups import in_group

WORLDS = (1, 2, 4)


def allocated_bytes() -> int:
    """Bytes of all CPU storages that live tensors refer to, each counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor) and thing.device.type == "cpu":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and type(tensor) in (torch.Tensor, torch.nn.Parameter):
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _measure(engine_name: str, out: str) -> None:
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.optim.config import OptimizerConfig
    from deco_scale.parallel.engines.base import EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.engines.fsdp import FsdpEngine
    from deco_scale.parallel.mesh import ParallelDims
    from deco_scale.precision.config import PrecisionConfig

    model = ModelConfig(
        kind="t2i_deco", dim=256, num_heads=4, num_blocks=4, num_text_blocks=1, patch_size=8, decoder_width=16,
        decoder_blocks=1, text_dim=64, text_tokens=8,
    )  # fmt: skip

    def build() -> Objective:
        return Objective(Denoiser(model), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)

    world = dist.get_world_size()
    # Under ZeRO without parameters that stay whole on every rank, and with a small buffer for reductions, whose
    # size does not depend on the model.
    zero = {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000}
    settings = EngineSettings(
        dims=ParallelDims(1, world), device=torch.device("cpu"), optimizer=OptimizerConfig(),
        precision=PrecisionConfig(compute="fp32"), overrides={"zero_optimization": zero},
    )  # fmt: skip
    before = allocated_bytes()
    engine = (FsdpEngine if engine_name == "fsdp" else DeepSpeedEngine)(build, settings)
    used = allocated_bytes() - before
    parameters = sum(p.numel() for p in build().parameters())
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps({"used": used, "whole": 4 * parameters}))
    del engine


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("zero3", marks=pytest.mark.long)])
def test_state_falls_as_one_over_ranks(engine: str, tmp_path: Path) -> None:
    found = {}
    for world in WORLDS:
        out = tmp_path / f"{world}.json"
        in_group(_measure, world, tmp_path, engine, str(out))
        found[world] = json.loads(out.read_text())
    used = {world: entry["used"] for world, entry in found.items()}
    print(engine, used, "whole weights", found[1]["whole"])
    # Weights, average and two moments; DeepSpeed also has a second copy of the weights, to compute with, and a
    # standing buffer for gradients, which FSDP makes in the first step only.
    parts, wholes = state_copies("fsdp" if engine == "fsdp" else "deepspeed", 3)
    assert wholes == 0 and parts - (engine == "fsdp") == (4 if engine == "fsdp" else 6)
    assert used[1] / found[1]["whole"] == pytest.approx(4 if engine == "fsdp" else 6, rel=0.1)
    for world in WORLDS[1:]:
        assert used[1] / used[world] == pytest.approx(world, rel=0.1)


LOADED = ModelConfig(
    kind="t2i_deco", dim=512, num_heads=8, num_blocks=8, num_text_blocks=1, patch_size=16, decoder_width=16,
    decoder_blocks=1, text_dim=64, text_tokens=8,
)  # fmt: skip


def _peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def _load_under_deepspeed(folder: str, out: str) -> None:
    from deco_scale.objectives import Objective, ObjectiveConfig
    from deco_scale.optim.config import OptimizerConfig
    from deco_scale.parallel.engines.base import EngineSettings
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
    from deco_scale.parallel.mesh import ParallelDims
    from deco_scale.precision.config import PrecisionConfig

    world = dist.get_world_size()
    engine = DeepSpeedEngine(
        lambda: Objective(Denoiser(LOADED), ObjectiveConfig(repa_weight=0.0), encoder_dim=0),
        EngineSettings(
            dims=ParallelDims(1, world),
            device=torch.device("cpu"),
            optimizer=OptimizerConfig(),
            precision=PrecisionConfig(compute="fp32"),
            overrides={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
        ),
    )
    before = _peak()
    CheckpointManager(Path(out) / f"run{dist.get_rank()}", CheckpointConfig()).load(engine, Path(folder))
    grown = [0] * world
    dist.all_gather_object(grown, _peak() - before)
    if dist.get_rank() == 0:
        (Path(out) / "grown.json").write_text(json.dumps(grown))


@pytest.mark.long
def test_loading_under_deepspeed_takes_one_shard(tmp_path: Path) -> None:
    shapes = {f"{k}.denoiser.{n}": s for k in ("model", "ema", "exp_avg", "exp_avg_sq")
              for n, s in denoiser_shapes(LOADED).items()}  # fmt: skip
    meta = CheckpointMeta(
        step=1, stage="a", samples=1, seed=0, optimizer_steps=1, data_state={}, parameter_digest="", config={}
    )
    specs = {name: TensorSpec(shape) for name, shape in shapes.items()}
    write_canonical(tmp_path / "whole", specs, lambda name: torch.rand(shapes[name]), meta, files=2)
    in_group(_load_under_deepspeed, 2, tmp_path, str(tmp_path / "whole"), str(tmp_path))
    whole = sum(spec.nbytes for spec in specs.values())
    grown = json.loads((tmp_path / "grown.json").read_text())
    print(f"state {whole / 2**20:.0f} MiB, peaks of two ranks grew by {[g // 2**20 for g in grown]} MiB")
    # What was read of the rank's own half, a copy of its masters, its moments (training's own, first touched by
    # loading), and what a few whole parameters and the pieces being checked take.
    assert max(grown) < whole / 2 + whole / 8 + whole / 4 + 128 * 2**20
