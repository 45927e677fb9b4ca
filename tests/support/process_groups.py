"""Runs of the real launcher code in process groups, one start of processes for all runs of a world size."""

import dataclasses
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor, Replicate

from deco_scale.observability.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: configuration (plain), and what to resume from."""

    name: str
    config: dict[str, Any]
    resume: str = "none"


def run_jobs(jobs: list[Job], world: int, scratch: Path) -> None:
    """Run ``jobs`` one after the other on ``world`` processes that share one process group."""
    store = scratch / f"store_{world}_{len(list(scratch.iterdir()))}"
    _start(_worker, world, jobs, world, str(store))


def _worker(rank: int, variables: dict[str, str], jobs: list[Job], world: int, store: str) -> None:
    _prepare(variables)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from deco_scale.config import build_config
    from deco_scale.distributed.bootstrap import Environment
    from launcher.train import run

    with open(os.devnull, "w") as nothing:
        if rank:
            sys.stdout = nothing
        for job in jobs:
            cfg = build_config(job.config, source=job.name)
            run(cfg, Environment(rank, world, rank), resume=job.resume)
            dist.barrier()
    dist.destroy_process_group()


def in_group(target: Callable[..., None], world: int, scratch: Path, *args: Any) -> None:
    """Call ``target(*args)`` on ``world`` processes of a gloo group."""
    store = scratch / f"store_{target.__name__}_{world}_{len(list(scratch.iterdir()))}"
    _start(_enter, world, target, world, str(store), args)


def _enter(
    rank: int, variables: dict[str, str], target: Callable[..., None], world: int, store: str, args: Any
) -> None:
    _prepare(variables)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29502"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    target(*args)
    dist.destroy_process_group()


def fork_server() -> None:
    """Name what the server of this session's forked processes imports, see preloaded.py; no effect once it runs.

    Its variables are those of its start; :func:`_prepare` gives a process those of the test.
    """
    multiprocessing.set_forkserver_preload(["tests.support.preloaded"])


def _start(enter: Callable[..., None], world: int, *args: Any) -> None:
    # A process that has asked for a GPU cannot be forked from.
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    fork_server()
    mp.start_processes(enter, args=(dict(os.environ), *args), nprocs=world, start_method=method)


def _prepare(variables: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)


def full_tensor(tensor: DTensor) -> torch.Tensor:
    """``tensor.full_tensor()``, also over a mesh with tp before dp, which PyTorch 2.11 cannot gather at once."""
    if tensor.device_mesh.mesh_dim_names != ("tp", "dp"):
        return tensor.full_tensor()
    for dim in reversed(range(tensor.device_mesh.ndim)):
        placements = list(tensor.placements)
        placements[dim] = Replicate()
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()


def trace(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in RunDir(run).refresh().steps()}


def worst_difference(found: dict[int, tuple[float, float]], wanted: dict[int, tuple[float, float]]) -> float:
    """Largest relative difference over the steps that ``found`` has."""
    return max(
        abs(a - b) / abs(b) for step, values in found.items() for a, b in zip(values, wanted[step], strict=True)
    )
