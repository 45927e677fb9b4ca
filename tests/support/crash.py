"""A process that saves checkpoints of known content without end, to be killed at any moment.

Each process is forked from a server that has imported everything, so that a start takes a tenth of a second.
"""

import multiprocessing
import os
import socket
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deco_scale.checkpoint.config import CheckpointConfig
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.manager import CheckpointManager
from tests.support.process_groups import fork_server

SHAPES = {"denoiser.blocks.weight": (600, 1000), "denoiser.bias": (37,), "projection.weight": (50, 60)}
KINDS = ("model", "ema", "exp_avg", "exp_avg_sq")


def content(step: int, scale: int = 1) -> dict[str, Tensor]:
    """The state after ``step``; ``scale`` multiplies the rows of the largest tensor."""
    generator = torch.Generator().manual_seed(step)
    shapes = {n: (s[0] * scale if len(s) == 2 else s[0], *s[1:]) for n, s in SHAPES.items()}
    return {f"{k}.{n}": torch.randn(s, generator=generator) for k in KINDS for n, s in shapes.items()}


class PlainEngine:
    """The checkpoint's view of an engine: named tensors and a counter."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.optimizer_steps = tensors, 0

    def state(self) -> dict[str, Tensor]:
        return self.tensors

    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        self.optimizer_steps = optimizer_steps


def meta_of(step: int, **fields: Any) -> CheckpointMeta:
    plain: dict[str, Any] = {
        "step": step, "stage": "s", "samples": 8 * step, "seed": 0, "optimizer_steps": 0, "data_state": {},
        "parameter_digest": "", "config": {},
    }  # fmt: skip
    return CheckpointMeta(**(plain | fields))


def join_alone() -> None:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def work(
    folder: Path, settings: dict[str, Any], variables: dict[str, str], scale: int, steps: int, room: int | None,
    channel: socket.socket,
) -> None:  # fmt: skip
    """Clean up, resume, check every bit, then save ``steps`` more; tells its parent a line at a time.

    Before it saves, the file system is filled up but for ``room`` bytes.
    """
    os.environ |= variables
    torch.set_num_threads(1)
    join_alone()

    def tell(line: str) -> None:
        channel.sendall(f"{line}\n".encode())

    checkpoints = CheckpointManager(folder / "run", CheckpointConfig(**settings))
    checkpoints.prepare()
    engine, step = PlainEngine(content(0, scale)), 0
    found = checkpoints.resume(engine, "auto")  # type: ignore[arg-type]
    if found is not None:
        step = found[0].step
        wanted = content(step, scale)
        equal = all(torch.equal(engine.tensors[n], t) for n, t in wanted.items())
        assert engine.optimizer_steps == step
        tell(f"resumed {step} {'equal' if equal else 'CHANGED'}")
    else:
        tell("fresh")
    if room is not None:
        disk = os.statvfs(folder)
        (folder / "ballast").write_bytes(bytes(max(0, disk.f_bavail * disk.f_frsize - room)))
    for number in range(step + 1, step + 1 + steps):
        engine.tensors, engine.optimizer_steps = content(number, scale), number
        tell(f"starting {number}")
        report(checkpoints.start(engine, meta_of(number)), tell)  # type: ignore[arg-type]
    report(checkpoints.finished(wait=True), tell)
    tell("done")


def report(saved: Any, tell: Any) -> None:
    if saved is not None:
        tell(f"failed {saved.error}" if saved.error else f"saved {saved.message.split()[1].rpartition('_')[2]}")


class Process:
    """A forked worker and what it has told so far."""

    def __init__(
        self, context: ForkServerContext, folder: Path, settings: dict[str, Any], *, scale: int = 1,
        steps: int = 1000, room: int | None = None, variables: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self._ours, theirs = socket.socketpair()
        self.process = context.Process(
            target=work, args=(folder, settings, variables or {}, scale, steps, room, theirs), daemon=True
        )
        self.process.start()
        theirs.close()
        self._ours.settimeout(60)
        self._text = b""

    def read_until(self, word: str) -> list[str]:
        """Lines up to the first that begins with ``word``; all of them if the process ends before."""
        while not any(line.startswith(word) for line in self.lines):
            piece = self._ours.recv(4096)
            if not piece:
                break
            self._text += piece
        return self.lines

    @property
    def lines(self) -> list[str]:
        return self._text.decode().splitlines()

    def kill(self) -> list[str]:
        """SIGKILL, and everything that was told before."""
        self.process.kill()
        self.process.join()
        return self.read_until("nothing begins like this")

    def end(self) -> list[str]:
        lines = self.read_until("nothing begins like this")
        self.process.join()
        return lines


def context() -> ForkServerContext:
    fork_server()
    return multiprocessing.get_context("forkserver")
