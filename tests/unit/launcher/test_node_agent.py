"""The processes of a node: numbered, told of signals, and none left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deco_scale.observability.events import REQUEUE
from launcher.schedulers import node_agent
from launcher.schedulers.node_agent import Node, main, probe
from tests.support import ROOT


def node_of(tmp_path: Path, processes: int = 2) -> Node:
    return Node(nodes=2, processes=processes, rank=1, pids=tmp_path / "pids")


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_node_numbers_its_processes(tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
    write = f"import os; v = [os.environ[n] for n in {names}]; open('{tmp_path}/' + v[0], 'w').write(' '.join(v))"
    assert node_of(tmp_path).run(python(write), port=123) == 0
    assert [(tmp_path / rank).read_text() for rank in "23"] == ["2 4 0 2 123", "3 4 1 2 123"]


def test_a_node_ends_with_the_first_failure_and_leaves_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_agent, "EXIT_WAIT_S", 0.1)
    body = f"""
import os, subprocess, sys, time
if os.environ['LOCAL_RANK'] == '0':
    while not os.path.exists('{tmp_path}/child'): time.sleep(0.01)
    sys.exit({REQUEUE})
child = subprocess.Popen(['sleep', '600'])
open('{tmp_path}/part', 'w').write(str(child.pid)); os.rename('{tmp_path}/part', '{tmp_path}/child')
time.sleep(600)
"""
    assert node_of(tmp_path).run(python(body), port=1) == REQUEUE
    left = int((tmp_path / "child").read_text())
    for _ in range(100):
        # The child's child is not ours to reap: it may stay a zombie where nothing adopts it.
        state = Path(f"/proc/{left}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("a process of the node still runs")
    assert node_of(tmp_path, 1).run(python("import os; os.kill(os.getpid(), 9)"), port=1) == 137


def test_signals_reach_every_process_and_the_probe_sees_one_that_is_stopped(tmp_path: Path) -> None:
    program = tmp_path / "launcher"
    program.mkdir()
    (program / "train.py").write_text(
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({REQUEUE}))\n"
        f"open('{tmp_path}/up' + os.environ['RANK'], 'w').close()\n"
        "while True: time.sleep(0.05)\n"
    )
    pids = tmp_path / "pids"
    words = ["-m", "launcher.schedulers.node_agent", "--nodes", "1", "--processes", "2", "--entry", str(tmp_path)]
    environment = {**os.environ, "MASTER_PORT": "1", "NODE_RANK": "0", "PYTHONPATH": str(ROOT)}
    assert probe(pids) == 1
    node = subprocess.Popen([sys.executable, *words, "--pids", str(pids), "--", "--config", "x"], env=environment)
    while not ((tmp_path / "up0").exists() and (tmp_path / "up1").exists() and pids.exists()):
        time.sleep(0.02)
    assert probe(pids) == 0
    stopped = json.loads(pids.read_text())[1]
    os.kill(stopped, signal.SIGSTOP)
    while probe(pids) == 0:
        time.sleep(0.01)
    os.kill(stopped, signal.SIGCONT)
    node.send_signal(signal.SIGTERM)
    assert node.wait(timeout=20) == REQUEUE
    assert probe(pids) == 1


def test_a_node_needs_its_number(capsys: pytest.CaptureFixture[str]) -> None:
    for variables in ({"MASTER_PORT": "1"}, {"MASTER_PORT": "1", "NODE_RANK": "2"}):
        with pytest.raises(SystemExit, match="2"):
            main(["--nodes", "2"], variables)
    assert "NODE_RANK" in capsys.readouterr().err
