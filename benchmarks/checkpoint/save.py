"""How long saving blocks a step, how fast it writes, and how fast checkpoints are resharded, against ``cp``.

    python -m benchmarks.checkpoint                       # 1 GiB of state on the disk of the temporary folder
    python -m benchmarks.checkpoint --folder /mnt/disk

One process saves the same state in turn with ``checkpoint.asynchronous`` on and off, and copies the bytes with
``cp`` and a sync; medians of the rounds count. The first asynchronous save also makes its plan and is reported
separately. While an asynchronous save runs, the process does matrix products as a training step would; how much
longer they take than alone is reported as work lost beside the stall.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import record
from benchmarks.checkpoint import reshard
from benchmarks.checkpoint.reshard import copy_seconds
from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.parallel.engines.base import Engine

TENSOR_SHAPE = (1024, 1024)
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")
PROMISE = 0.15
"""Largest stall of an asynchronous save, as a part of a synchronous one."""
PRODUCT_SIDE = 512


class RandomState:
    """The checkpoint's view of an engine: named random tensors and a counter."""

    optimizer_steps = 0

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        count = max(1, num_bytes // (len(KINDS) * 4 * TENSOR_SHAPE[0] * TENSOR_SHAPE[1]))
        generator = torch.Generator(device).manual_seed(0)
        self.tensors = {
            f"{kind}.denoiser.{i}": torch.randn(TENSOR_SHAPE, device=device, generator=generator)
            for kind in KINDS
            for i in range(count)
        }

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


def meta_of(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step, stage="bench", samples=step, seed=0, optimizer_steps=0, data_state={}, parameter_digest="",
        config={},
    )  # fmt: skip


def work_for(products: int) -> float:
    """Seconds of some matrix products."""
    left = torch.ones(PRODUCT_SIDE, PRODUCT_SIDE)
    began = time.perf_counter()
    for _ in range(products):
        left @ left
    return time.perf_counter() - began


def save_once(checkpoints: CheckpointManager, state: RandomState, step: int) -> tuple[float, float]:
    """Stall and total seconds of a save; the caller's thread does nothing else."""
    began = time.perf_counter()
    checkpoints.start(cast(Engine, state), meta_of(step))
    saved = checkpoints.finished(wait=True)
    assert saved is not None and saved.error is None, saved
    return saved.stall_s, time.perf_counter() - began


def lost_work(checkpoints: CheckpointManager, state: RandomState, step: int) -> float:
    """Seconds that products take longer while a save runs than alone."""
    piece = 20
    checkpoints.start(cast(Engine, state), meta_of(step))
    began, pieces = time.perf_counter(), 0
    while True:
        work_for(piece)
        pieces += 1
        saved = checkpoints.finished()
        if saved is not None:
            break
    beside = time.perf_counter() - began
    assert saved.error is None, saved
    return beside - work_for(piece * pieces)


def measure(folder: Path, num_bytes: int, rounds: int) -> dict[str, Any]:
    state = RandomState(num_bytes, torch.device("cpu"))
    makers = {True: folder / "asynchronous", False: folder / "synchronous"}
    ways = {
        a: CheckpointManager(path, CheckpointConfig(keep_last=1, asynchronous=a)) for a, path in makers.items()
    }
    for checkpoints in ways.values():
        checkpoints.prepare()
        checkpoints.reserve(cast(Engine, state))
    first_stall, _ = save_once(ways[True], state, 1)
    save_once(ways[False], state, 1)
    stalls, totals, synchronous, copies, lost = [], [], [], [], []
    for number in range(rounds):
        stall, total = save_once(ways[True], state, 3 * number + 2)
        stalls.append(stall)
        totals.append(total)
        synchronous.append(save_once(ways[False], state, 3 * number + 2)[1])
        copies.append(copy_seconds(makers[False], folder / "copy"))
        lost.append(lost_work(ways[True], state, 3 * number + 3))
    held, whole = statistics.median(stalls), statistics.median(synchronous)
    return {
        "bytes": state.nbytes,
        "rounds": rounds,
        "stall_first_s": first_stall,
        "stall_s": held,
        "asynchronous_total_s": statistics.median(totals),
        "synchronous_s": whole,
        "stall_ratio": held / whole,
        "lost_work_s": statistics.median(lost),
        "cp_s": statistics.median(copies),
        "save_bytes_per_s": state.nbytes / whole,
        "cp_bytes_per_s": state.nbytes / statistics.median(copies),
    }


def show(result: dict[str, Any], console: Console) -> None:
    table = Table("", "seconds", "bytes/s", title=f"saving {result['bytes'] / 2**30:.2f} GiB")
    table.add_row("held up, first asynchronous save", f"{result['stall_first_s']:.3f}", "")
    table.add_row("held up, asynchronous", f"{result['stall_s']:.3f}", "")
    table.add_row("work lost beside it", f"{result['lost_work_s']:.3f}", "")
    table.add_row("held up, synchronous", f"{result['synchronous_s']:.3f}", f"{result['save_bytes_per_s']:.3g}")
    table.add_row("cp and sync", f"{result['cp_s']:.3f}", f"{result['cp_bytes_per_s']:.3g}")
    console.print(table)
    ratio = result["stall_ratio"]
    kept = "kept" if ratio <= PROMISE else "NOT KEPT"
    console.print(f"stall {100 * ratio:.1f}% of a synchronous save (promise: {100 * PROMISE:.0f}%): {kept}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        result = {**record.origin(), **measure(Path(scratch), int(args.gib * 2**30), args.rounds)}
        dist.destroy_process_group()
    show(result, console)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        workers = len(os.sched_getaffinity(0))
        resharded = reshard.measure(Path(scratch), int(args.gib * 2**30), args.rounds, workers)
    fast = reshard.show(resharded, console)
    record.write({**result, "resharding": resharded}, args.out, "checkpoint", console)
    return 0 if fast and result["stall_ratio"] <= PROMISE else 1
