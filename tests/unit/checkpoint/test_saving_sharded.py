"""Checkpoints and EMA exports of tensors that several ranks share."""

import json
import resource
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from data_pipeline.storage.dev_server import S3Server
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import read_meta
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.checkpoint.staging import Stager, local_part, parameter_digest
from deco_scale.checkpoint.storage import open_objects
from deco_scale.parallel.engines.base import Engine
from tests.support.crash import PlainEngine, meta_of
from tests.support.process_groups import in_group
from tests.support.saving import alone, make, save

pytestmark = pytest.mark.slow

SHARDED = {"a": (7, 6), "b": (5, 8), "c": (3,), "d": (2, 4)}


def _sharded(seed: int) -> dict[str, Tensor]:
    """A state over 2 x 2 ranks: rows, columns, rows of both axes, and copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    places = {"a": (Shard(0), Shard(1)), "b": (Replicate(), Shard(0)), "c": (Shard(0), Replicate())}
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for kind in ("model", "ema", "exp_avg", "exp_avg_sq"):
        for name, shape in SHARDED.items():
            whole = torch.randn(shape, generator=generator)
            state[f"{kind}.denoiser.{name}"] = (
                distribute_tensor(whole, mesh, places[name]) if name in places else whole
            )
    return state


def _export(root: str) -> None:
    checkpoints = CheckpointManager(Path(root) / "run", CheckpointConfig(ema_every=2, ema_steps=(3,)))
    if dist.get_rank() == 0:
        checkpoints.prepare()
    dist.barrier()
    assert [checkpoints.export_due(s) for s in (1, 2, 3, 4, 5)] == [False, True, True, True, False]
    meta = meta_of(2, config={"model": {"dim": 3}})
    state = _sharded(0)
    checkpoints.start(cast(Engine, PlainEngine(state)), meta, checkpoint=False, export=True)
    both = checkpoints.start(cast(Engine, PlainEngine(_sharded(1))), meta_of(3), checkpoint=True, export=True)
    assert both is not None and both.error is None and "EMA export" in both.message, both
    saved = checkpoints.finished(wait=True)
    assert saved is not None and saved.error is None and "checkpoint" in saved.message, saved
    for step in (2, 3):
        found = load_file(Path(root) / "exports" / f"ema_step_{step:08d}" / "model.safetensors")
        wanted = _sharded(step - 2)
        for name in SHARDED:
            tensor = wanted[f"ema.denoiser.{name}"]
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            assert torch.equal(found[name], whole), name
        assert found.keys() == SHARDED.keys()
    # The digest that was taken of the staged parts is that of the live ones.
    assert read_meta(Path(root) / "run" / "step_00000003").parameter_digest == parameter_digest(
        Stager().stage(_sharded(1))
    )
    target = {name: torch.zeros_like(tensor) for name, tensor in _sharded(0).items()}
    checkpoints.load(cast(Engine, PlainEngine(target)), Path(root) / "run" / "step_00000003")
    for name, tensor in _sharded(1).items():
        assert (
            torch.equal(target[name], tensor)
            if not isinstance(tensor, DTensor)
            else torch.equal(cast(DTensor, target[name]).to_local(), tensor.to_local())
        ), name
    settings = json.loads((Path(root) / "exports" / "ema_step_00000002" / "config.json").read_text())
    assert settings["model"] == {"dim": 3} and settings["provenance"]["step"] == 2
    _through_s3(Path(root) / "far", "s3://sharded/run")


def _through_s3(folder: Path, url: str) -> None:
    """Every rank uploads its own files, rank 0 the export; what comes back is equal on every rank."""
    checkpoints = CheckpointManager(folder / "run", CheckpointConfig(url=url))
    if dist.get_rank() == 0:
        checkpoints.prepare()
    dist.barrier()
    state = _sharded(4)
    checkpoints.start(cast(Engine, PlainEngine(state)), meta_of(4), checkpoint=True, export=True)
    saved = checkpoints.finished(wait=True)
    assert saved is not None and saved.error is None and f"{url}/exports/ema_step_00000004" in saved.message, saved
    dist.barrier()
    assert list((folder / "run").iterdir()) == [] and list((folder / "exports").iterdir()) == []
    target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    checkpoints.load(cast(Engine, PlainEngine(target)), f"{url}/step_00000004")
    assert all(torch.equal(local_part(target[name]), local_part(tensor)) for name, tensor in state.items())
    whole = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items() if n.startswith("ema")}
    if dist.get_rank() == 0:
        objects = open_objects(f"{url}/exports/ema_step_00000004")
        found = load(objects.read_all("model.safetensors") or b"")
        assert all(torch.equal(found[n.removeprefix("ema.denoiser.")], t) for n, t in whole.items())
        assert json.loads(objects.read_all("config.json") or b"")["weights"] == "ema"


def test_exports_and_checkpoints_of_sharded_tensors_from_a_thread(
    tmp_path: Path, s3_environment: S3Server
) -> None:
    s3_environment.create_bucket("sharded")
    (tmp_path / "files").mkdir()
    in_group(_export, 4, tmp_path, str(tmp_path / "files"))


ROWS, TENSORS = 1024, 24
"""24 tensors of 4 MiB in each of four sets: 384 MiB in all."""


def _big(fill: float) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    local = torch.full((ROWS // 2, 1024), fill)
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq")
    names = [f"{kind}.denoiser.{i}" for kind in kinds for i in range(TENSORS)]
    return {name: DTensor.from_local(local.clone(), mesh, [Shard(0)], run_check=False) for name in names}


def _load_big(root: str, limit: int) -> None:
    checkpoints = CheckpointManager(Path(root) / "run", CheckpointConfig())
    if dist.get_rank() == 0:
        checkpoints.prepare()
    dist.barrier()
    held = _big(0.0)
    path = Path(root) / "run" / "step_00000001"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    checkpoints.load(cast(Engine, PlainEngine(held)), path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert all(bool((cast(DTensor, t).to_local() == 3.0).all()) for t in held.values())
    assert grown < limit, f"loading took {grown / 2**20:.0f} MiB beyond the rank's own part"


def _save_whole(folder: Path) -> None:
    """One file with whole tensors, as a single process saves them."""
    kinds = ("model", "ema", "exp_avg", "exp_avg_sq")
    state = {f"{kind}.denoiser.{i}": torch.full((ROWS, 1024), 3.0) for kind in kinds for i in range(TENSORS)}
    with alone():
        save(make(folder), cast(Engine, PlainEngine(state)), meta_of(1))


def test_loading_takes_no_more_than_a_rank_s_part(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    _save_whole(tmp_path / "files")
    # Half is 192 MiB, which is there before; the bound is for one stored tensor and pieces being checked.
    in_group(_load_big, 2, tmp_path, str(tmp_path / "files"), 80 * 2**20)
