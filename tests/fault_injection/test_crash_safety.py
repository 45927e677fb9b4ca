"""SIGKILL at any moment of saving, to a disk, to S3, and to a disk that is full: what is complete stays."""

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.storage.base import open_store
from data_pipeline.storage.dev_server import S3Server
from deco_scale.checkpoint.format import COMPLETE, verify
from tests.support.crash import Process, context

SETTINGS: dict[str, Any] = {"every": 1, "keep_last": 2}
DISK_BYTES = 48 * 2**20
"""Room for the checkpoints that are kept, one that a kill kept from being retired, and one being written."""
S3_SCALE = 8
"""Then a file has 77 MB: five parts of an upload."""


def check_start(lines: list[str], sure: int) -> int:
    """The step that a start found, at least ``sure``; all bits are those that were saved."""
    first = lines[0].split()
    assert first[0] == "fresh" or first[2] == "equal", lines[0]
    step = 0 if first[0] == "fresh" else int(first[1])
    assert step >= sure, f"step {step} was found, {sure} was complete"
    return step


def saved(lines: list[str]) -> int:
    return max((int(line.split()[1]) for line in lines if line.startswith("saved")), default=0)


def leftovers(run: Path) -> list[str]:
    return [p.name for p in run.iterdir() if p.name.startswith(".")]


def kill_again_and_again(
    folder: Path, settings: dict[str, Any], runs: int, within_s: float, **process: Any
) -> None:
    """Kill ``runs`` processes, each up to ``within_s`` after a save has begun; check what the next finds."""
    made, sure = context(), 0
    for number in range(runs):
        running = Process(made, folder, settings, **process)
        # The first run leaves something to come back to.
        lines = running.read_until("starting" if number else "saved")
        sure = max(sure, check_start(lines, sure))
        time.sleep(random.uniform(0, within_s))
        sure = max(sure, saved(running.kill()))
    last = Process(made, folder, settings, steps=1, **process)
    lines = last.end()
    step = check_start(lines, sure)
    assert lines[-1] == "done" and saved(lines) == step + 1
    assert step > 0 and leftovers(folder / "run") == []


def run_local(folder: Path, runs: int) -> None:
    kill_again_and_again(folder, SETTINGS, runs, within_s=0.25)
    for path in sorted((folder / "run").iterdir()):
        verify(path)
    assert len(list((folder / "run").iterdir())) == SETTINGS["keep_last"]


def run_s3(folder: Path, server: S3Server, runs: int) -> None:
    server.create_bucket("crash")
    url = f"s3://crash/{folder.name}-{random.getrandbits(32):08x}"
    settings = {**SETTINGS, "url": url}
    kill_again_and_again(folder, settings, runs, within_s=2.0, scale=S3_SCALE, variables=server.environment)
    assert list((folder / "run").iterdir()) == []
    names: dict[str, list[str]] = {}
    for found in open_store(url).list():
        step, _, name = found.key.partition("/")
        names.setdefault(step, []).append(name)
    assert len(names) == 2 and all(COMPLETE in each and len(each) == 4 for each in names.values())
    assert unfinished_uploads(server, "crash") == 0


def unfinished_uploads(server: S3Server, bucket: str) -> int:
    import boto3

    client = boto3.session.Session().client("s3")
    return len(client.list_multipart_uploads(Bucket=bucket).get("Uploads", []))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of ``DISK_BYTES``; mounting it takes root."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here (no root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run_full(disk: Path, runs: int) -> None:
    """Ballast makes saves fail half-way, kills fall between, and the next start has room again."""
    made, sure = context(), 0
    ballast = disk / "ballast"
    for number in range(runs):
        room = random.choice([0, 5, 9]) * 2**20 if number else None
        running = Process(made, disk, SETTINGS, steps=3, room=room)
        lines = running.read_until("failed" if number else "saved")
        step = check_start(lines, sure)
        if number:
            failed = next(line for line in lines if line.startswith("failed"))
            assert "No space left on device" in failed and str(disk) in failed, failed
            if number % 2:
                time.sleep(random.uniform(0, 0.1))
                running.kill()
            else:
                assert running.end()[-1] == "done"
                assert leftovers(disk / "run") == []
        else:
            running.end()
        sure = max(sure, step, saved(running.lines))
        ballast.unlink(missing_ok=True)
    lines = Process(made, disk, SETTINGS, steps=1).end()
    step = check_start(lines, sure)
    assert saved(lines) == step + 1 and leftovers(disk / "run") == []


def seed_by_time() -> None:
    """Other moments each time; the seed is shown where a test fails."""
    seed = time.time_ns()
    print(f"random.seed({seed})")
    random.seed(seed)


def test_kills_while_saving_to_a_disk(tmp_path: Path) -> None:
    seed_by_time()
    run_local(tmp_path, 3)


def test_kills_while_uploading(tmp_path: Path, s3_environment: S3Server) -> None:
    seed_by_time()
    run_s3(tmp_path, s3_environment, 2)


def test_kills_on_a_full_disk(small_disk: Path) -> None:
    seed_by_time()
    run_full(small_disk, 3)


@pytest.mark.long
def test_sixty_kills(tmp_path: Path, small_disk: Path, s3_environment: S3Server) -> None:
    seed_by_time()
    (tmp_path / "local").mkdir()
    (tmp_path / "s3").mkdir()
    run_local(tmp_path / "local", 30)
    run_s3(tmp_path / "s3", s3_environment, 23)
    # Every other of these is killed.
    run_full(small_disk, 15)
