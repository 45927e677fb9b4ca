"""SIGKILL at any moment, then resume: elsewhere, under another engine, and the trace goes on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.assets import tiny_config
from tests.conftest import ROOT
from tests.distributed.harness import trace, worst_difference

STEPS = 12
TOLERANCE = 1e-5
"""Relative, fp32: other layouts only change the order of sums."""


def start(config: Path, processes: int, *overrides: str) -> subprocess.Popen[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
        str(ROOT / "launcher" / "train.py"), "--config", str(config), *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def steps_done(run: Path) -> int:
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    complete = [line for line in path.read_text().splitlines() if line.endswith("}")]
    return max((json.loads(line)["step"] for line in complete), default=0)


def kill_after(process: subprocess.Popen[str], run: Path, step: int, delay_s: float) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / f"{Path(config['run']['dir']).name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_killed_and_resumed_elsewhere(tmp_path: Path, shards: Path, text_encoder: Path) -> None:
    whole = tiny_config(tmp_path / "whole", shards, text_encoder)
    whole["checkpoint"] = {"every": 1, "keep_last": 2}
    finish(start(write(tmp_path, whole), 1, "parallel.engine=fsdp"))
    wanted = trace(tmp_path / "whole")
    assert sorted(wanted) == list(range(1, STEPS + 1))

    run = tmp_path / "killed"
    killed = tiny_config(run, shards, text_encoder)
    killed["checkpoint"] = {"every": 1, "keep_last": 2}
    config = write(tmp_path, killed)
    random.seed(0)
    attempts = [(2, "fsdp", 2), (1, "deepspeed", 5), (2, "deepspeed", 9)]
    for processes, engine, step in attempts:
        process = start(config, processes, f"parallel.engine={engine}")
        # A checkpoint is saved after every step, so some kills fall into a save.
        kill_after(process, run, step, random.uniform(0, 0.3))
        assert steps_done(run) >= step
    output = finish(start(config, 1, "parallel.engine=fsdp"))
    assert "resumed from" in output
    found = trace(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert worst_difference(found, wanted) < TOLERANCE
    leftovers = [p for p in (run / "checkpoints").iterdir() if p.name.startswith(".saving")]
    assert not leftovers


@pytest.mark.long
def test_twenty_kills_at_random_moments(tmp_path: Path, shards: Path, text_encoder: Path) -> None:
    random.seed(1)
    runs = {}
    for name in ("whole", "killed"):
        config = tiny_config(tmp_path / name, shards, text_encoder)
        config["stages"][0]["steps"] = 60
        config["checkpoint"] = {"every": 1, "keep_last": 2}
        runs[name] = write(tmp_path, config)
    finish(start(runs["whole"], 1))
    for _ in range(20):
        done = steps_done(tmp_path / "killed")
        process = start(runs["killed"], random.choice([1, 2]))
        kill_after(process, tmp_path / "killed", done + random.randint(1, 3), random.uniform(0, 0.5))
    finish(start(runs["killed"], 1))
    found, wanted = trace(tmp_path / "killed"), trace(tmp_path / "whole")
    assert found.keys() == wanted.keys() and worst_difference(found, wanted) < TOLERANCE


@pytest.mark.parametrize("engine", ["fsdp", "deepspeed"])
def test_same_layout_is_bit_equal_after_a_kill(
    engine: str, tmp_path: Path, shards: Path, text_encoder: Path
) -> None:
    for name in ("whole", "killed"):
        config = tiny_config(tmp_path / name, shards, text_encoder)
        config["parallel"] = {"engine": engine}
        path = write(tmp_path, config)
        if name == "killed":
            # Checkpoints stand at steps 4 and 8: the kill at 6 throws two steps away.
            kill_after(start(path, 2), tmp_path / name, 6, 0.0)
        finish(start(path, 2))
    assert trace(tmp_path / "killed") == trace(tmp_path / "whole")
