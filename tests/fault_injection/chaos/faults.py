"""The faults of the chaos test: what each does, and what must come of it.

A fault strikes a running attempt at a moment: ``step`` (between 0 and 0.6 s after a step was logged), ``save``
(while a checkpoint is written) or ``start`` (within the first seconds after a launch, before any step).
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from data_pipeline.storage.dev_server import S3Server
from deco_scale.checkpoint.format import verify
from deco_scale.errors import ConfigError
from deco_scale.observability.run_dir import COMPLETE, STEP
from tests.fault_injection.chaos.cluster import Attempt, Cluster
from tests.fault_injection.chaos.watch import Watch

Moment = Literal["step", "save", "start"]
OUTAGE_S = (2.0, 6.0)
BLIP_S = (0.5, 2.0)


class Scene(Protocol):
    """What a fault may lay hands on; ``tick`` lets the job go on for a moment, and restarts it after an end."""

    cluster: Cluster
    attempt: Attempt
    watch: Watch
    random: random.Random
    checkpoints: Path
    server: S3Server

    def tick(self) -> None: ...

    def await_end(self) -> int:
        """Wait for the end of the attempt, which is not restarted; its exit code."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of fault. ``ends``: whether the attempt must end by it (None: it may).

    ``strike`` does it and returns facts for the log; ``ready`` says whether it can. ``loses``: a rank, which must
    be reported.
    """

    name: str
    ends: bool | None
    strike: Callable[[Scene], dict[str, Any]]
    ready: Callable[[Scene], bool] = lambda scene: True
    loses: bool = False


def complete_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    marks = checkpoints.glob(f"{STEP}*/{COMPLETE}")
    return sorted(int(mark.parent.name.removeprefix(STEP)) for mark in marks)


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{STEP}{step:08d}"


def is_good(checkpoints: Path, step: int) -> bool:
    """Whether a checkpoint is there and every file of it is as it was written."""
    try:
        verify(folder_of(checkpoints, step))
    except ConfigError:
        return False
    return True


def good_steps(checkpoints: Path) -> list[int]:
    return [step for step in complete_steps(checkpoints) if is_good(checkpoints, step)]


def saving(checkpoints: Path) -> bool:
    return any(checkpoints.glob(".saving*"))


def _signal_rank(scene: Scene, number: signal.Signals) -> dict[str, Any]:
    rank, pid = scene.random.choice(sorted(scene.cluster.ranks().items()))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    return {"rank": rank}


def _kill(scene: Scene) -> dict[str, Any]:
    return _signal_rank(scene, signal.SIGKILL)


def _stop(scene: Scene) -> dict[str, Any]:
    return _signal_rank(scene, signal.SIGSTOP)


def _terminate(scene: Scene) -> dict[str, Any]:
    for launcher in scene.attempt.launchers:
        launcher.terminate()
    return {}


def _s3_outage(scene: Scene) -> dict[str, Any]:
    outage_s = scene.random.uniform(*OUTAGE_S)
    scene.server.kill()
    _pass(scene, outage_s)
    scene.server.start()
    return {"outage_s": round(outage_s, 1)}


def _cut(scene: Scene) -> dict[str, Any]:
    """Until the job has ended; the cable is whole again when it starts."""
    assert scene.cluster.network is not None
    node = scene.random.randrange(scene.cluster.nodes)
    scene.cluster.network.cut(node)
    try:
        code = scene.await_end()
    finally:
        scene.cluster.network.mend(node)
    return {"node": node, "code": code}


def _blip(scene: Scene) -> dict[str, Any]:
    """So short that the connections live on."""
    assert scene.cluster.network is not None
    node, blip_s = scene.random.randrange(scene.cluster.nodes), scene.random.uniform(*BLIP_S)
    scene.cluster.network.cut(node)
    try:
        _pass(scene, blip_s)
    finally:
        scene.cluster.network.mend(node)
    return {"node": node, "cut_s": round(blip_s, 1)}


def _disk_full(scene: Scene) -> dict[str, Any]:
    """From within a save until one has failed."""
    began, ballast = time.monotonic(), scene.checkpoints / ".ballast"
    file = os.open(ballast, os.O_RDWR | os.O_CREAT)
    try:
        while not scene.watch.events("checkpoint_failed", since=began):
            _fill(file)
            scene.tick()
            assert time.monotonic() - began < 120, "no save failed on a full disk"
    finally:
        os.close(file)
        ballast.unlink()
    return {"full_s": round(time.monotonic() - began, 1)}


def _fill(file: int) -> None:
    """Take all room of the file's disk."""
    piece = 2**24
    while piece >= 4096:
        try:
            os.posix_fallocate(file, os.fstat(file).st_size, piece)
        except OSError:
            piece //= 2


def _corrupt(scene: Scene) -> dict[str, Any]:
    """Kill a rank, and turn a bit of the newest checkpoint before the job starts again."""
    facts = _kill(scene)
    code = scene.await_end()
    newest = max(good_steps(scene.checkpoints))
    files = folder_of(scene.checkpoints, newest).glob("*.distcp")
    victim = scene.random.choice(sorted(files))
    data = bytearray(victim.read_bytes())
    at = scene.random.randrange(len(data))
    data[at] ^= 1 << scene.random.randrange(8)
    victim.write_bytes(data)
    return {**facts, "code": code, "damaged": newest, "file": victim.name, "byte": at}


def _pass(scene: Scene, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        scene.tick()


KINDS = {
    kind.name: kind
    for kind in (
        Kind(name="SIGKILL of a rank", ends=True, strike=_kill, loses=True),
        Kind(name="SIGSTOP of a rank", ends=True, strike=_stop, loses=True),
        Kind(name="SIGTERM of the job", ends=True, strike=_terminate),
        Kind(name="S3 server killed", ends=None, strike=_s3_outage),
        Kind(name="network cut", ends=True, strike=_cut),
        Kind(name="network cut for a moment", ends=None, strike=_blip),
        Kind(name="disk full during a save", ends=False, strike=_disk_full),
        Kind(
            name="newest checkpoint damaged",
            ends=True,
            strike=_corrupt,
            ready=lambda scene: len(good_steps(scene.checkpoints)) > 1,
            loses=True,
        ),
    )
}
"""By name; a NaN in a gradient is planted by :mod:`tests.fault_injection.chaos.entry`."""
