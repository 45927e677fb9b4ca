"""Jobs for clusters: every word arrives as it was given, nothing secret is written, what cannot run is refused."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from deco_scale.observability.events import REQUEUE
from deco_scale.observability.redact import looks_secret
from launcher import submit
from launcher.schedulers.base import TEMPLATES, ClusterJob
from launcher.schedulers.slurm import render_slurm
from tests.support.submission import HOSTILE, HOSTS, SLURM, refused, rendered


class FakeCluster:
    """``srun`` and ``scontrol`` as shell scripts that write down what they are given."""

    def __init__(self, folder: Path, srun: str) -> None:
        self.folder = folder
        self._write("srun", srun)
        self._write("scontrol", f'echo "$*" >> {folder}/scontrol.log; [ "$1" = requeue ] || printf "n3\\nn4\\n"')

    def _write(self, name: str, body: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)

    def start(self, script: str, **variables: str) -> "subprocess.Popen[str]":
        found = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[3-4]", **variables}
        environment = {**os.environ, **found, "PATH": f"{self.folder}:{os.environ['PATH']}"}
        file = self.folder / "job.sh"
        file.write_text(script)
        return subprocess.Popen(["bash", str(file)], env=environment, stderr=subprocess.PIPE, text=True)

    def run(self, script: str, **variables: str) -> int:
        process = self.start(script, **variables)
        process.communicate(timeout=20)
        return process.returncode

    @property
    def requeued(self) -> bool:
        log = self.folder / "scontrol.log"
        found = "requeue 7" in log.read_text()
        log.unlink()
        return found


def slurm_script(log_dir: Path, **settings: Any) -> str:
    plain: dict[str, Any] = {
        "name": "a", "config": "c.yaml", "overrides": (), "nodes": 2, "processes": 1, "gpus": True,
        "entry": "/e", "python": "python", "preflight": False,
    }  # fmt: skip
    return render_slurm(ClusterJob(**{**plain, **settings}), submit.parse([*SLURM, "--log-dir", str(log_dir)]))


def test_every_word_reaches_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words"
    cluster = FakeCluster(tmp_path, f'printf "%s\\0" "$@" >> {words}; echo "$MASTER_ADDR $A" >> {tmp_path}/env')
    text = rendered(capsys, *SLURM, "--env", "A=x y'$(id)", HOSTILE)
    assert cluster.run(text) == 0
    given = words.read_text().split("\0")
    assert given.count(HOSTILE) == 2
    programs = [Path(word).name for word in given if word.endswith(".py")]
    assert programs == ["preflight.py", "train.py"]
    assert (tmp_path / "env").read_text().splitlines() == ["n3 x y'$(id)"] * 2
    assert not cluster.requeued


@pytest.mark.parametrize(
    ("code", "attempts", "again"),
    [(REQUEUE, 4, [True] * 4), (137, 3, [True, True, False]), (1, 1, [False]), (2, 1, [False])],
)
def test_the_exit_code_decides_about_a_restart(
    tmp_path: Path, code: int, attempts: int, again: list[bool]
) -> None:
    cluster = FakeCluster(tmp_path, f"exit {code}")
    script = slurm_script(tmp_path, max_restarts=2)
    for attempt in range(attempts):
        assert cluster.run(script) == code
        assert cluster.requeued is again[attempt]


def test_preflight_that_refuses_starts_no_training(tmp_path: Path) -> None:
    cluster = FakeCluster(tmp_path, f'echo "$*" >> {tmp_path}/calls; exit 1')
    assert cluster.run(slurm_script(tmp_path, preflight=True)) == 1
    assert "preflight.py" in (tmp_path / "calls").read_text()
    assert "train.py" not in (tmp_path / "calls").read_text()


def test_a_signal_reaches_the_step_and_its_own_exit_code_counts(tmp_path: Path) -> None:
    # The step takes a moment to save after the signal; the script must wait for it.
    body = f"trap 'echo got >> {tmp_path}/got; sleep 0.3; exit {REQUEUE}' USR1; touch {tmp_path}/up; "
    cluster = FakeCluster(tmp_path, body + "while true; do sleep 0.05; done")
    process = cluster.start(slurm_script(tmp_path))
    while not (tmp_path / "up").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=20)
    assert process.returncode == REQUEUE
    assert (tmp_path / "got").read_text().startswith("got")
    assert cluster.requeued


def test_no_requeue_ends_with_the_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = FakeCluster(tmp_path, f"exit {REQUEUE}")
    assert cluster.run(rendered(capsys, *SLURM, "--no-requeue")) == REQUEUE
    assert not cluster.requeued


def test_directives(capsys: pytest.CaptureFixture[str]) -> None:
    text = rendered(
        capsys, *SLURM, "--time", "1-12", "--partition", "gpu", "--account", "a1", "--env", "WANDB_API_KEY"
    )
    found = {line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")}
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=1", "time=1-12", "partition=gpu", "account=a1"} <= found
    assert {"signal=B:USR1@120", "requeue"} <= found
    exported = next(line for line in found if line.startswith("export="))
    assert "WANDB_API_KEY" in exported and "ALL" not in exported
    on_cpu = rendered(capsys, *SLURM, "device=cpu")
    assert "gpus-per-node" not in on_cpu


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--time", "soon"], "--time"),
        (["--partition", "a\n#SBATCH --uid=0"], "--partition"),
        (["--name", "a b"], "--name"),
        (["--nodes", "0"], "--nodes"),
        (["--log-dir", "%u"], "--log-dir"),
        (["run.dir=a\nb"], "control character"),
        (["--env", "1A=x"], "--env '1A'"),
        (["--env", "A=1", "--env", "A"], "twice"),
        (["stages.demo.global_batch=33"], "stages.demo.global_batch=33"),
        (["parallel.tp=3"], "parallel.tp=3"),
        (["no.such=1"], "no"),
    ],
)
def test_wrong_use_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert named in refused(capsys, *SLURM, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--env", "WANDB_API_KEY=0123456789"],
        ["--env", "HF_TOKEN=planted0"],
        ["--env", "PROXY=http://me:planted@proxy:3128"],
        ["--env", "A=AKIAPLANTEDPLANTED00"],
        ["data.url=https://h/x?X-Amz-Signature=planted"],
    ],
)
def test_secrets_are_refused_and_not_repeated(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    told = refused(capsys, *SLURM, *arguments)
    assert "looks like a secret" in told
    assert arguments[-1].partition("=")[2] not in told


def test_ordinary_names_are_no_secrets() -> None:
    for name in ("model.text_tokens", "text_encoder.max_tokens", "TOKENIZERS_PARALLELISM", "AWS_PROFILE"):
        assert not looks_secret(name, "16")
    assert not looks_secret("AWS_SHARED_CREDENTIALS_FILE", "/home/me/.aws/credentials")
    assert not looks_secret("data.url", "s3://bucket/prefix")


# --- templates of users ---


def test_a_copied_template_may_be_edited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.j2"
    original = (TEMPLATES / "slurm.sh.j2").read_text()
    mine.write_text(original.replace("set -u", "set -u\nmodule load {{ job.name | quote }}"))
    text = rendered(capsys, *SLURM, "--template", str(mine), "--name", "a.b")
    assert "module load a.b\n" in text
    plain = rendered(capsys, *SLURM, "--name", "a.b")
    assert text.replace("module load a.b\n", "") == plain


@pytest.mark.parametrize(
    ("body", "line", "named"),
    [
        ("a\n{{ nodez }}", 2, "'nodez' is undefined"),
        ("{{ job.nodez }}", 1, "nodez"),
        ("a\nb\n{% if %}", 3, "Expected"),
        ("{{ job.nodes + 'a' }}", 1, "unsupported"),
        ("a\n{{ job.command.__func__.__globals__ }}", 2, "unsafe"),
        ("a\n{% include 'none.j2' %}", 2, "none.j2"),
        ("a\nexport KEY=AKIAPLANTEDPLANTED00", 2, "looks like a secret"),
    ],
)
def test_a_wrong_template_is_named_with_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, line: int, named: str
) -> None:
    mine = tmp_path / "mine.j2"
    mine.write_text(body)
    message = refused(capsys, *SLURM, "--template", str(mine))
    assert f"{mine}, line {line}" in message and named in message


def test_a_template_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.j2" in refused(capsys, *SLURM, "--template", str(tmp_path / "none.j2"))


# --- hosts ---


def test_hostfile_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host file"
    assert submit.main([*HOSTS, "n0,n1", "--out", str(out), HOSTILE]) == 0
    assert out.read_text() == "n0 slots=1\nn1 slots=1\n"
    told = capsys.readouterr().err
    assert "not submitted" in told and "preflight.py" in told
    assert "--hosts" in refused(capsys, *HOSTS, "n0,n0")
    assert "--hosts" in refused(capsys, *HOSTS, "n0,-oProxyCommand=x")
    # Ranks are bound to CPUs unless the configuration says otherwise.
    assert "run.cpu_binding=numa" in told
    assert submit.main([*HOSTS, "n0,n1", "run.cpu_binding=none"]) == 0
    assert "run.cpu_binding=numa" not in capsys.readouterr().err
    job = ClusterJob(
        name="a", config="c", overrides=(HOSTILE,), nodes=1, processes=1, gpus=True, entry="/e", python="/b/python"
    )
    commands = submit.host_commands(job, out)
    assert [command[0] for command in commands] == ["/b/deepspeed"] * 2
    assert all(command[-1] == HOSTILE for command in commands)


def test_nothing_is_submitted_without_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\ncat > {tmp_path}/given\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    text = rendered(capsys, *SLURM)
    assert not (tmp_path / "given").exists()
    assert rendered(capsys, *SLURM, "--submit") == text
    assert (tmp_path / "given").read_text() == text
    sbatch.write_text("#!/bin/bash\nexit 3\n")
    assert submit.main([*SLURM, "--submit"]) == 1
    assert "nothing was submitted" in capsys.readouterr().err
