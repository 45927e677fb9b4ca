"""What the tests of ``launcher/submit.py`` share: its arguments, and what it prints."""

import pytest

from launcher import submit
from tests.support import CONFIGS

CONFIG = CONFIGS / "t2i_tiny.yaml"
HOSTILE = 'run.dir=/runs/it\'s $(touch /tmp/x) `id` "a"; b'
SLURM = ["slurm", "--config", str(CONFIG), "--nodes", "2", "--gpus-per-node", "1"]
K8S = [
    "k8s",
    "--config",
    str(CONFIG),
    "--nodes",
    "2",
    "--gpus-per-node",
    "1",
    "--image",
    "reg.example:5000/deco:1",
]
VOLUME = ["--volume", "runs:/runs", "run.dir=/runs/x"]
HOSTS = ["hosts", "--config", str(CONFIG), "--nodes", "2", "--gpus-per-node", "1", "--hosts"]


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert submit.main(arguments) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        assert submit.main(arguments) == 2
    except SystemExit as refusal:  # by argparse
        assert refusal.code == 2
    found = capsys.readouterr()
    assert not found.out
    return found.err
