"""The watchdog with real processes: what befalls a rank is told once, ends the job, and leaves nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT

TIMEOUT_S = 1.5
SOON_S = 5.0
"""How long after the watchdog's time a fault may be told, and everything be gone."""


class Job:
    """``actions`` of :mod:`tests.support.watched`, one a rank, started together."""

    def __init__(
        self, folder: Path, *actions: str, slow_timeout_s: float = 20.0, stderr: int | None = None
    ) -> None:
        self.run = folder / "run"
        self.run.mkdir(parents=True)
        self.stderr = folder / "stderr.txt"
        self.ranks = []
        for rank, action in enumerate(actions):
            words = [rank, len(actions), self.run, TIMEOUT_S, slow_timeout_s, action]
            with self.stderr.open("ab") as file:
                command = [sys.executable, "-m", "tests.support.watched", *map(str, words)]
                environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1"}
                self.ranks.append(subprocess.Popen(command, stderr=stderr or file, env=environment, cwd=ROOT))
        self.sidecars: list[psutil.Process] = []
        self.ports: list[int] = []

    def ready(self) -> "Job":
        """Wait until all ranks train; notes what must be gone at the end."""
        deadline = time.monotonic() + 30
        while not all((self.run.parent / f"ready_{rank}").exists() for rank in range(len(self.ranks))):
            assert time.monotonic() < deadline, self.stderr.read_text()
            time.sleep(0.01)
        for rank in self.ranks:
            children = psutil.Process(rank.pid).children()
            self.sidecars += [p for p in children if "deco_scale.watchdog.sidecar" in p.cmdline()]
        assert len(self.sidecars) == len(self.ranks)
        connections = self.sidecars[0].net_connections("inet")
        self.ports = [c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN]
        assert len(self.ports) == (1 if len(self.ranks) > 1 else 0)
        return self

    def codes(self, seconds: float) -> list[int]:
        """Exit codes of the ranks, which end within this time; then nothing of the job is left."""
        deadline = time.monotonic() + seconds
        found = [rank.wait(max(0.01, deadline - time.monotonic())) for rank in self.ranks]
        for sidecar in self.sidecars:
            sidecar.wait(max(0.01, deadline - time.monotonic() + 1.0))
            assert not sidecar.is_running()
        for port in self.ports:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port), timeout=1)
        return found

    @property
    def events(self) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stacks(self, rank: int) -> str:
        (found,) = self.run.glob(f"stacks/*/rank_{rank:05d}_*.txt")
        return found.read_text()

    def end(self) -> None:
        for process in [*self.sidecars, *(psutil.Process(r.pid) for r in self.ranks if r.poll() is None)]:
            if process.is_running():
                process.kill()
        for rank in self.ranks:
            rank.wait()


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Any]:
    started: list[Job] = []

    def start(*actions: str, **options: Any) -> Job:
        started.append(Job(tmp_path / f"job_{len(started)}", *actions, **options))
        return started[-1]

    yield start
    for job in started:
        job.end()


def told_once(job: Job, kind: str, rank: int) -> dict[str, Any]:
    """The only event, which names this rank; stderr and the log say the same."""
    (event,) = job.events
    assert (event["kind"], event["rank"], event["host"]) == (kind, rank, socket.gethostname())
    for text in (job.stderr.read_text(), (job.run / "log.txt").read_text()):
        assert text.count("watchdog:") == 1 and f"rank {rank} on {socket.gethostname()}" in text
    return event


def test_a_stopped_rank_is_reported_with_its_stack(jobs: Any) -> None:
    job = jobs("", "", "").ready()
    job.ranks[1].send_signal(signal.SIGSTOP)
    began = time.time()
    assert job.codes(TIMEOUT_S + SOON_S) == [-signal.SIGKILL] * 3
    event = told_once(job, "hang", 1)
    assert event["time"] - began < TIMEOUT_S + SOON_S
    assert "stopped (state T)" in event["how"] and "main (watched.py:" in event["stack"]
    for rank in range(3):
        text = job.stacks(rank)
        assert f"rank: {rank}\n" in text and "watched.py" in text and "in main" in text
    assert "state: T" in job.stacks(1) and "phase: step" in job.stacks(1)


def test_hung_ranks_are_reported_with_their_stacks(jobs: Any) -> None:
    """In Python, in a C call that holds the GIL, after it reported its exit, in a long operation, alone."""
    actions = [("", "hang"), ("", "lock"), ("", "exit"), ("", "slower"), ("hang",)]
    started = [jobs(*ranks, slow_timeout_s=TIMEOUT_S) for ranks in actions]
    for job in started:
        job.ready()
    for job, ranks in zip(started, actions, strict=True):
        assert job.codes(TIMEOUT_S + SOON_S + 1) == [-signal.SIGKILL] * len(ranks)
        hung = len(ranks) - 1
        function = "sleeps_in_the_lock" if "lock" in ranks else "waits_for_ever"
        event = told_once(job, "hang", hung)
        assert event["stack"].startswith(function) and ("in a long operation" in event["how"]) == (
            "slower" in ranks
        )
        assert f"in {function}\n" in job.stacks(hung)


def test_killed_ranks_end_the_others(jobs: Any) -> None:
    """Rank 0, another one, and one alone; what they have started ends too, and nobody holds a pipe open."""
    started = [jobs("children", "peer"), jobs("peer", "children"), jobs("")]
    reader, writer = os.pipe()
    started.append(jobs("", "", stderr=writer))
    os.close(writer)
    for job in started:
        job.ready()
    time.sleep(3.0)  # sidecars look for children now and then
    children = []
    for victim, job in enumerate(started[:2]):
        of_rank = psutil.Process(job.ranks[victim].pid).children(recursive=True)
        children += [child for child in of_rank if child not in job.sidecars]
    assert len(children) == 4
    for job, victim in zip(started, (0, 1, 0, 0), strict=True):
        job.ranks[victim].kill()
        (job.run.parent / "broken").touch()
    started[3].ranks[1].kill()
    os.set_blocking(reader, False)
    for job, victim in zip(started, (0, 1, 0, 0), strict=True):
        assert job.codes(SOON_S) == [-signal.SIGKILL] * len(job.ranks)
        (event,) = job.events
        assert event["kind"] == "lost_rank" and "exited without reporting why" in event["how"]
        assert event["rank"] == victim or job is started[3]
        assert "no stacks: the process is gone" in job.stacks(victim)
    told_once(started[0], "lost_rank", 0)
    assert "wait_for_verdict" in started[0].stacks(1) and "wait_for_verdict" in started[1].stacks(0)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    text = os.read(reader, 10_000) + os.read(reader, 10_000)  # blocks if somebody has the other end
    assert text.count(b"watchdog: ") == 1
    os.close(reader)


def test_lost_sidecars_end_the_job(jobs: Any) -> None:
    """The node of one may be lost with it: who is unwatched must not go on."""
    cases = [(0, signal.SIGKILL), (1, signal.SIGKILL), (0, signal.SIGSTOP)]
    started = [jobs("", "") for _ in cases]
    for job in started:
        job.ready()
    for job, (victim, number) in zip(started, cases, strict=True):
        job.sidecars[victim].send_signal(number)
    for job, (victim, _) in zip(started, cases, strict=True):
        codes = job.codes(SOON_S + 5.0)
        # The lost one's own trainer exits by itself or is killed by a neighbour.
        assert codes[1 - victim] == -signal.SIGKILL and codes[victim] in (1, -signal.SIGKILL)
        (event,) = job.events
        assert (event["kind"], event["rank"]) == ("lost_rank", victim) and "sidecar" in event["how"]


def test_an_error_ends_the_others_with_its_code(jobs: Any) -> None:
    job, first = jobs("", "peer", "error").ready(), jobs("error", "hang").ready()
    assert job.codes(SOON_S + 3.0) == [2, 2, 2]
    assert first.codes(SOON_S + 3.0) == [2, 2]  # rank 0 waits for its sidecar by then
    (event,) = job.events
    assert (event["kind"], event["exit_code"]) == ("end", 2)
    assert "rank 2" in event["reason"] and "the cat bit through the cable" in event["reason"]
    assert not list(job.run.glob("stacks/*/rank*"))


def test_normal_ends_are_no_faults(jobs: Any) -> None:
    """Done, stopped and saved, a slow phase, one rank alone, rank 0 before the others; signals to sidecars."""
    started = [jobs("", "", ""), jobs("stop", "stop"), jobs("", "slow"), jobs(""), jobs("", "late")]
    for job in started:
        job.ready()
        for sidecar in job.sidecars:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                sidecar.send_signal(number)
    for job in started:
        (job.run.parent / "enough").touch()
    for job, code in zip(started, (0, 75, 0, 0, 0), strict=True):
        assert set(job.codes(8.0)) == {code}
        assert not job.events and not job.stderr.read_text() and not list(job.run.iterdir())


def test_a_disk_that_fails_does_not_hold_up_the_end(jobs: Any) -> None:
    """A folder that cannot be written, and a file on which every write waits for ever."""
    started = [jobs("", "hang"), jobs("", "hang")]
    for job in started:
        job.ready()
    started[0].run.rename(started[0].run.with_name("elsewhere"))
    started[0].run.write_text("no folder")
    os.mkfifo(started[1].run / "events.jsonl")
    for job in started:
        assert job.codes(TIMEOUT_S + SOON_S + 2.0) == [-signal.SIGKILL] * 2
        text = job.stderr.read_text()
        assert "rank 1" in text and "could not be written" in text
    assert "in waits_for_ever" in started[0].stderr.read_text() and "in waits_for_ever" in started[1].stacks(1)


def test_strangers_cannot_end_the_job(jobs: Any) -> None:
    job = jobs("", "").ready()
    (port,) = job.ports
    wrong = json.dumps({"token": "0" * 64, "member": {"rank": 1}}).encode() + b"\n"
    sent = [b"\0" * 70_000, b"{" * 2000 + b"\n", wrong, b"[]\n", b"", b"null\n"]
    held = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    for data in sent * 3:
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.settimeout(3)
            with suppress(ConnectionError):
                stranger.sendall(data)
                assert not data or stranger.recv(100) == b""
    assert [rank.poll() for rank in job.ranks] == [None, None] and not job.events
    job.ranks[1].kill()
    assert job.codes(SOON_S) == [-signal.SIGKILL] * 2
    told_once(job, "lost_rank", 1)
    for stranger in held:
        stranger.close()
