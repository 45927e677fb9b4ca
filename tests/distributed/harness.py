"""Runs of the real launcher code in spawned process groups, one spawn for all runs of a world size."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deco_scale.training.report import read_metrics


@dataclasses.dataclass(frozen=True)
class Job:
    """A run: configuration (plain), and what to resume from."""

    name: str
    config: dict[str, Any]
    resume: str = "none"


def run_jobs(jobs: list[Job], world: int, scratch: Path) -> None:
    """Run ``jobs`` one after the other on ``world`` processes that share one process group."""
    store = scratch / f"store_{world}_{len(list(scratch.iterdir()))}"
    mp.start_processes(_worker, args=(jobs, world, str(store)), nprocs=world, start_method="spawn")


def _worker(rank: int, jobs: list[Job], world: int, store: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501", "OMP_NUM_THREADS": "1"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from deco_scale.config import build_config
    from deco_scale.environment import Environment
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
    mp.start_processes(_enter, (target, world, str(store), args), nprocs=world, start_method="spawn")


def _enter(rank: int, target: Callable[..., None], world: int, store: str, args: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29502"}
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    target(*args)
    dist.destroy_process_group()


def trace(run: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm by step."""
    return {e["step"]: (e["loss"], e["grad_norm"]) for e in read_metrics(run)}


def worst_difference(found: dict[int, tuple[float, float]], wanted: dict[int, tuple[float, float]]) -> float:
    """Largest relative difference over the steps that ``found`` has."""
    return max(
        abs(a - b) / abs(b) for step, values in found.items() for a, b in zip(values, wanted[step], strict=True)
    )
