"""The script of ``launcher/submit.py slurm`` on a real SLURM: two tasks train, a signal is handed on, requeue."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deco_scale.observability.events import REQUEUE
from deco_scale.yaml import dump_yaml
from launcher import submit
from tests.support.assets import tiny_config
from tests.support.slurm import Slurm, running_slurm, why_not

REASON = why_not()
pytestmark = [pytest.mark.long, pytest.mark.skipif(REASON is not None, reason=f"no SLURM here: {REASON}")]
TIME_LIMIT_S = 60
# Stands for a trainer that saves when it is told to stop, and has nothing left to do the second time.
TRAINER = f"""
import os, signal, sys, time
from pathlib import Path
here, rank = Path(__file__).parent, os.environ["SLURM_PROCID"]
attempt = os.environ.get("SLURM_RESTART_COUNT", "0")
if attempt != "0":
    (here / f"again_{{rank}}").write_text(attempt)
    sys.exit(0)
def save(number, frame):
    (here / f"signalled_{{rank}}").write_text(repr(time.time()))
    time.sleep(0.5)
    sys.exit({REQUEUE})
signal.signal(signal.SIGUSR1, save)
(here / f"ready_{{rank}}").write_text(repr(time.time()))
time.sleep(600)
"""
# One rank is lost without a word; the other notices and fails by itself a little later.
LOSES_A_RANK = """
import os, signal, sys, time
if os.environ["SLURM_PROCID"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(3)
sys.exit(1)
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with running_slurm(tmp_path_factory.mktemp("slurm")) as found:
        yield found


def write_job(config: Path, out: Path, *more: str) -> Path:
    common = [
        "slurm",
        "--config",
        str(config),
        "--nodes",
        "1",
        "--gpus-per-node",
        "2",
        "--log-dir",
        str(out.parent),
    ]
    assert submit.main([*common, "--python", sys.executable, "--out", str(out), *more]) == 0
    subprocess.run(["bash", "-n", str(out)], check=True)
    return out


@pytest.fixture
def config(tmp_path: Path, shards: Path, text_encoder: Path) -> Path:
    raw = tiny_config(tmp_path / "run", shards, text_encoder)
    path = tmp_path / "tiny job.yaml"
    path.write_text(dump_yaml({**raw, "device": "cpu"}))
    return path


def until(path: Path, timeout_s: float = 60.0) -> float:
    """The time that a trainer has written there."""
    deadline = time.monotonic() + timeout_s
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.1)
    return float(path.read_text())


def steps_of(run: Path) -> list[int]:
    """Steps that were logged, in order."""
    file = run / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line["step"] for line in lines if "loss" in line]


def trainer_folder(tmp_path: Path, text: str = TRAINER) -> Path:
    """A folder with a space in its name and a ``launcher/train.py`` that stands for the trainer."""
    folder = tmp_path / "other code" / "launcher"
    folder.mkdir(parents=True)
    (folder / "train.py").write_text(text)
    return folder


def test_two_tasks_pass_preflight_and_train(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    script = write_job(config, tmp_path / "job.sh", "--name", "tiny", "--env", "OMP_NUM_THREADS=1")
    subprocess.run(["sbatch", "--test-only", str(script)], env=cluster.environment, check=True)
    job = cluster.submit(script)
    facts = cluster.wait(job, "COMPLETED", 180)
    log = (tmp_path / f"tiny-{job}.log").read_text()
    assert facts["ExitCode"] == "0:0", log
    assert steps_of(tmp_path / "run") == list(range(1, 13))
    told = (tmp_path / "run" / "preflight.log").read_text()
    assert "all_reduce" in told and "refused" not in told


def test_a_signal_reaches_both_tasks_and_the_job_is_requeued_and_finishes(
    cluster: Slurm, config: Path, tmp_path: Path
) -> None:
    folder = trainer_folder(tmp_path)
    out = tmp_path / "job.sh"
    script = write_job(config, out, "--name", "told", "--no-preflight", "--entry", str(folder.parent))
    job = cluster.submit(script)
    for rank in "01":
        until(folder / f"ready_{rank}")
    cluster.ask("scancel", "--batch", "--signal=USR1", str(job))
    for rank in "01":
        until(folder / f"signalled_{rank}")
    cluster.wait(job, "PENDING", 60, restarts=1)
    cluster.hurry(job)
    cluster.wait(job, "COMPLETED", 240, restarts=1)
    assert [(folder / f"again_{rank}").read_text() for rank in "01"] == ["1", "1"]
    assert f"exit code {REQUEUE}: back into the queue" in (tmp_path / f"told-{job}.log").read_text()


def test_the_real_trainer_saves_comes_back_and_goes_on(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    last = 104
    more = ["stages.small.steps=100", "checkpoint.every=1000", "checkpoint.keep_last=9"]
    script = write_job(config, tmp_path / "job.sh", "--name", "goes-on", "--env", "OMP_NUM_THREADS=1", *more)
    job = cluster.submit(script)
    deadline = time.monotonic() + 120
    while len(steps_of(tmp_path / "run")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    cluster.ask("scancel", "--batch", "--signal=USR1", str(job))
    cluster.wait(job, "PENDING", 60, restarts=1)
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    assert len(saved) == 1 and saved[0] < f"step_{last:08d}"
    cluster.hurry(job)
    assert cluster.wait(job, "COMPLETED", 240, restarts=1)["ExitCode"] == "0:0"
    assert steps_of(tmp_path / "run") == list(range(1, last + 1))


def test_a_lost_rank_restarts_the_job_until_it_may_no_more(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    entry = trainer_folder(tmp_path, LOSES_A_RANK).parent
    settings = ["--name", "lost", "--no-preflight", "--entry", str(entry), "--max-restarts", "1"]
    job = cluster.submit(write_job(config, tmp_path / "job.sh", *settings))
    cluster.wait(job, "PENDING", 60, restarts=1)
    cluster.hurry(job)
    assert cluster.wait(job, "FAILED", 180, restarts=1)["ExitCode"] == "137:0"
    assert (tmp_path / f"lost-{job}.crashes").read_text() == "137\n137\n"


def test_the_signal_comes_before_the_time_limit(cluster: Slurm, config: Path, tmp_path: Path) -> None:
    folder = trainer_folder(tmp_path)
    limits = ["--time", "1", "--grace-s", "20", "--no-preflight", "--no-requeue"]
    script = write_job(config, tmp_path / "job.sh", "--name", "short", *limits, "--entry", str(folder.parent))
    job = cluster.submit(script)
    ready = until(folder / "ready_0")
    signalled = [until(folder / f"signalled_{rank}", 2 * TIME_LIMIT_S) for rank in "01"]
    # SLURM may send it up to a minute early, never after the limit.
    assert max(signalled) - ready < TIME_LIMIT_S
    assert cluster.wait(job, "FAILED", 60)["ExitCode"] == f"{REQUEUE}:0"
