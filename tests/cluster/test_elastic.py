"""A node is lost for good: torchrun goes on with the one that is left, with the same global batches."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deco_scale.observability.run_dir import RunDir
from deco_scale.yaml import dump_yaml
from tests.conftest import ROOT
from tests.fault_injection.test_kill import finish, start, steps_done
from tests.support.assets import tiny_config
from tests.support.ports import free_port
from tests.support.process_groups import trace, worst_difference

TOLERANCE = 1e-5
"""Relative, fp32: another number of ranks only changes the order of sums."""
STEPS = 40


def agent(config: Path, port: int, log: Path) -> "subprocess.Popen[bytes]":
    """One node's torchrun with two processes, of a job of one or two nodes."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "2",
        "--max-restarts", "3", "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
        "--rdzv_conf", "last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=3",
        "--local_addr", "127.0.0.1",
        str(ROOT / "launcher" / "train.py"), "--config", str(config),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Without it the trainers refuse to start: a restart would find the addresses of the attempt before.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    with log.open("wb") as output:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, stdout=output, stderr=subprocess.STDOUT
        )


@pytest.mark.long
def test_a_job_goes_on_with_fewer_nodes(tmp_path: Path, shards: Path, text_encoder: Path) -> None:
    configs = {}
    for name in ("whole", "elastic"):
        config = tiny_config(tmp_path / name, shards, text_encoder)
        config["stages"][0]["steps"] = STEPS - 4
        config["checkpoint"] = {"every": 5, "keep_last": 2}
        config["parallel"] = {"engine": "fsdp"}
        config["watchdog"] = {"timeout_s": 20.0}
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(dump_yaml(config))
    finish(start(configs["whole"], 1))
    port = free_port()
    first = agent(configs["elastic"], port, tmp_path / "first.log")
    # The first to come holds the meeting point.
    time.sleep(3)
    second = agent(configs["elastic"], port, tmp_path / "second.log")
    run = tmp_path / "elastic"
    deadline = time.monotonic() + 180
    while steps_done(run) < 12 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert 12 <= steps_done(run) < STEPS
    # The whole node goes: agent, trainers, sidecars.
    node = [psutil.Process(second.pid), *psutil.Process(second.pid).children(recursive=True)]
    for process in node:
        process.send_signal(signal.SIGKILL)
    second.wait()
    assert first.wait(timeout=300) == 0, (tmp_path / "first.log").read_text()[-3000:]
    folder = RunDir(run)
    folder.refresh()
    worlds = [e.fields["world_size"] for e in folder.events if e.kind == "start"]
    assert worlds[0] == 4 and worlds[-1] == 2
    assert any(e.kind == "lost_rank" for e in folder.events)
    found = trace(run)
    assert sorted(found) == list(range(1, STEPS + 1))
    assert worst_difference(found, trace(tmp_path / "whole")) < TOLERANCE
