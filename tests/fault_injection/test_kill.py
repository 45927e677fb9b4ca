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
import torch
from safetensors.torch import load_file

from deco_scale.checkpoint.format import read_meta, read_tensors
from deco_scale.yaml import dump_yaml
from tests.conftest import ROOT
from tests.support.assets import tiny_config
from tests.support.process_groups import Job, run_jobs, trace, worst_difference

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
    return max((json.loads(line).get("step", 0) for line in complete), default=0)


def kill_after(process: subprocess.Popen[str], run: Path, step: int, delay_s: float) -> None:
    deadline = time.monotonic() + 120
    while steps_done(run) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay_s)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def write(folder: Path, config: dict[str, Any]) -> Path:
    path = folder / f"{Path(config['run']['dir']).name}.yaml"
    path.write_text(dump_yaml(config))
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


@pytest.mark.long
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


def test_stages_and_fine_tuning_carry_what_they_should(tmp_path: Path, shards: Path, text_encoder: Path) -> None:
    """From one resolution to the next in one job or two: all state. Fine-tuning: the averaged weights alone."""

    def job(folder: str, name: str, **sections: Any) -> Job:
        config = tiny_config(tmp_path / folder, shards, text_encoder)
        for section, changes in sections.items():
            config[section] = {**config[section], **changes} if isinstance(changes, dict) else changes
        return Job(name, config, resume="auto")

    tuned = {"name": "sft", "resolution": 32, "steps": 1, "global_batch": 8, "micro_batch": 1, "lr": 0.0}
    checkpoints = tmp_path / "whole" / "checkpoints"
    kept = {"every": 4, "keep_last": 4, "ema_every": 6}
    run_jobs(
        [
            job("whole", "whole", checkpoint=kept),
            # Between the stages at 8 the process ends, and another goes on.
            job("parts", "first", run={"stop_at_step": 8}),
            job("parts", "second"),
            job(
                "tuned", "tuned", stages=[tuned], run={"seed": 9},
                checkpoint={"init_from": str(checkpoints / "step_00000012"), "init_weights": "ema"},
            ),
        ],
        1,
        tmp_path,
    )  # fmt: skip
    assert trace(tmp_path / "parts") == trace(tmp_path / "whole")
    at_change = read_tensors(checkpoints / "step_00000008", "")
    for kind in ("exp_avg", "exp_avg_sq"):
        assert any(bool(t.any()) for n, t in at_change.items() if n.startswith(f"{kind}.denoiser."))
    assert read_meta(checkpoints / "step_00000008").stage == "small"
    source = read_tensors(checkpoints / "step_00000012", "ema.")
    found = read_tensors(tmp_path / "tuned" / "checkpoints" / "step_00000001", "")
    assert read_meta(tmp_path / "tuned" / "checkpoints" / "step_00000001").optimizer_steps == 1
    # The rate is zero: after a step the weights are still what the run began with.
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in source.items())
    assert all(torch.allclose(found[f"ema.{name}"], tensor, rtol=1e-6, atol=0) for name, tensor in source.items())
    exported = load_file(tmp_path / "whole" / "exports" / "ema_step_00000012" / "model.safetensors")
    assert {f"denoiser.{name}" for name in exported} == source.keys()
    assert all(torch.equal(tensor, source[f"denoiser.{name}"]) for name, tensor in exported.items())
    assert (tmp_path / "whole" / "exports" / "ema_step_00000006").is_dir()
    entries = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    # Saved at 4, 6 (the EMA alone) and 8, told with the step after.
    assert [e["step"] for e in entries if "checkpoint_stall_s" in e] == [5, 7, 9]
