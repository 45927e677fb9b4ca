"""Jobs for clusters: every word arrives as it was given, nothing secret is written, what cannot run is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deco_scale.watching.events import REQUEUE
from launcher import submit
from launcher.scheduling.credentials import looks_secret
from launcher.scheduling.hosts import host_commands
from launcher.scheduling.job import Job
from launcher.scheduling.kubernetes import CONFIG_FOLDER
from launcher.scheduling.node import Node, main, probe
from launcher.scheduling.slurm import SlurmOptions, render_slurm

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "t2i_tiny.yaml"
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
    assert submit.main(arguments) == 2
    found = capsys.readouterr()
    assert not found.out
    return found.err


# --- SLURM ---


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
    return render_slurm(Job(**{**plain, **settings}), SlurmOptions(log_dir=str(log_dir)))


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


# --- Kubernetes: only the fields that these manifests may have, as the public API types name them ---


def closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    found = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    return found


TEXT, COUNT, FLAG = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
WORDS = {"type": "array", "items": TEXT}
PROBE = closed(
    {
        "exec": closed({"command": WORDS}, "command"),
        "periodSeconds": COUNT, "timeoutSeconds": COUNT, "failureThreshold": COUNT,
    },
    "exec",
)  # fmt: skip
REFERENCE = closed({"secretKeyRef": closed({"name": TEXT, "key": TEXT}, "name", "key")}, "secretKeyRef")
CONTAINER = closed(
    {
        "name": {"const": "pytorch"}, "image": TEXT, "workingDir": TEXT, "command": WORDS,
        "env": {"type": "array", "items": closed({"name": TEXT, "value": TEXT, "valueFrom": REFERENCE}, "name")},
        "resources": closed({"limits": {"type": "object"}, "requests": {"type": "object"}}),
        "ports": {"type": "array", "items": closed({"name": TEXT, "containerPort": COUNT}, "containerPort")},
        "startupProbe": PROBE, "livenessProbe": PROBE,
        "volumeMounts": {
            "type": "array",
            "items": closed({"name": TEXT, "mountPath": TEXT, "readOnly": FLAG}, "name", "mountPath"),
        },
    },
    "name", "image", "command", "startupProbe", "livenessProbe",
)  # fmt: skip
VOLUME_TYPE = closed(
    {
        "name": TEXT,
        "emptyDir": closed({"medium": {"const": "Memory"}, "sizeLimit": TEXT}, "medium"),
        "configMap": closed({"name": TEXT}, "name"),
        "persistentVolumeClaim": closed({"claimName": TEXT}, "claimName"),
    },
    "name",
)
POD = closed(
    {
        "containers": {"type": "array", "items": CONTAINER, "minItems": 1},
        "volumes": {"type": "array", "items": VOLUME_TYPE},
        "terminationGracePeriodSeconds": COUNT,
        "restartPolicy": {"const": "Never"},
    },
    "containers",
)
TEMPLATE = closed({"spec": POD}, "spec")
METADATA = closed({"name": TEXT, "namespace": TEXT, "labels": {"type": "object"}}, "name")
EXIT_CODES = closed(
    {"containerName": TEXT, "operator": {"enum": ["In", "NotIn"]}, "values": {"type": "array", "items": COUNT}},
    "operator",
    "values",
)
CONDITIONS = {"type": "array", "items": closed({"type": TEXT, "status": {"const": "True"}}, "type", "status")}
RULE = closed(
    {"action": {"enum": ["FailJob", "Ignore", "Count"]}, "onExitCodes": EXIT_CODES, "onPodConditions": CONDITIONS},
    "action",
)
BATCH_JOB = closed(
    {
        "parallelism": COUNT, "completions": COUNT, "completionMode": {"enum": ["Indexed", "NonIndexed"]},
        "backoffLimit": COUNT, "template": TEMPLATE,
        "podFailurePolicy": closed({"rules": {"type": "array", "items": RULE}}, "rules"),
    },
    "template",
)  # fmt: skip
FAILURE_RULE = closed(
    {
        "name": {"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "onJobFailureReasons": WORDS,
    },
    "name", "action",
)  # fmt: skip
JOBSET = closed(
    {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"}, "kind": {"const": "JobSet"}, "metadata": METADATA,
        "spec": closed(
            {
                "network": closed({"enableDNSHostnames": {"type": "boolean"}, "subdomain": TEXT}),
                "failurePolicy": closed({"maxRestarts": COUNT, "rules": {"type": "array", "items": FAILURE_RULE}}),
                "replicatedJobs": {
                    "type": "array",
                    "items": closed(
                        {"name": TEXT, "replicas": COUNT, "template": closed({"spec": BATCH_JOB}, "spec")},
                        "name", "template",
                    ),
                },
            },
            "replicatedJobs",
        ),
    },
    "apiVersion", "kind", "metadata", "spec",
)  # fmt: skip
REPLICAS = closed(
    {
        "replicas": COUNT,
        "restartPolicy": {"enum": ["Always", "OnFailure", "Never", "ExitCode"]},
        "template": TEMPLATE,
    },
    "replicas",
    "template",
)
CLEAN = {"enum": ["All", "Running", "None"]}
PYTORCHJOB = closed(
    {
        "apiVersion": {"const": "kubeflow.org/v1"}, "kind": {"const": "PyTorchJob"}, "metadata": METADATA,
        "spec": closed(
            {
                "runPolicy": closed({"cleanPodPolicy": CLEAN, "backoffLimit": COUNT}),
                "pytorchReplicaSpecs": closed({"Master": REPLICAS, "Worker": REPLICAS}, "Master"),
            },
            "pytorchReplicaSpecs",
        ),
    },
    "apiVersion", "kind", "metadata", "spec",
)  # fmt: skip


def manifests(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    text = rendered(capsys, *K8S, *VOLUME, *arguments)
    assert "&id" not in text
    config_map, job = yaml.safe_load_all(text)
    assert yaml.safe_load(config_map["data"]["config.yaml"]) == yaml.safe_load(CONFIG.read_text())
    return config_map, job


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    spec = job["spec"]
    if job["kind"] == "JobSet":
        return spec["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    return spec["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(("kind", "schema"), [("JobSet", JOBSET), ("PyTorchJob", PYTORCHJOB)])
def test_manifests_have_only_known_fields(
    capsys: pytest.CaptureFixture[str], kind: str, schema: dict[str, Any]
) -> None:
    more = ["--namespace", "ml", "--cpus", "8", "--memory", "64Gi", "--env", "KEY", "--secret", "s3"]
    _, job = manifests(capsys, "--kind", kind, *more)
    jsonschema.validate(job, schema)
    container = container_of(job)
    assert {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "KEY"}}} in container["env"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert f"{CONFIG_FOLDER}/config.yaml" in container["command"]


def test_a_jobset_restarts_as_a_whole_and_does_not_count_being_told_to_stop(
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, job = manifests(capsys, "--max-restarts", "9")
    batch = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (batch["parallelism"], batch["completions"], batch["backoffLimit"]) == (2, 2, 0)
    assert batch["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [REQUEUE]
    policy = job["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 9
    assert policy["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    volumes = batch["template"]["spec"]["volumes"]
    assert any(v.get("emptyDir", {}).get("medium") == "Memory" for v in volumes)


def test_kubernetes_expands_nothing_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    """Undo Kubernetes' own expansion (third_party/forked/golang/expansion): what was given is what arrives."""
    hostile = "a$(HOME)b$$(C)d$e$"
    _, job = manifests(capsys, "--env", f"A={hostile}")
    value = next(v["value"] for v in container_of(job)["env"] if v["name"] == "A")
    found, at = "", 0
    while at < len(value):
        pair = value[at : at + 2]
        assert pair != "$("
        found, at = (found + "$", at + 2) if pair == "$$" else (found + value[at], at + 1)
    assert found == hostile


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([*VOLUME, "--name", "A_b"], "--name"),
        ([*VOLUME, "--name", "a" * 60], "too long"),
        ([*VOLUME, "--env", "KEY"], "--secret"),
        ([*VOLUME, "--image", "bad image"], "--image"),
        ([*VOLUME, "--shm", "lots"], "--shm"),
        (["--volume", "runs"], "--volume"),
        (["--volume", "runs:/runs", "run.dir=/runs2/x"], "run.dir=/runs2/x is on no volume"),
    ],
)
def test_what_would_fail_in_a_pod_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert named in refused(capsys, *K8S, *arguments)


# --- hosts ---


def test_hostfile_and_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "host file"
    assert submit.main([*HOSTS, "n0,n1", "--out", str(out), HOSTILE]) == 0
    assert out.read_text() == "n0 slots=1\nn1 slots=1\n"
    told = capsys.readouterr().err
    assert "not submitted" in told and "preflight.py" in told
    assert "--hosts" in refused(capsys, *HOSTS, "n0,n0")
    assert "--hosts" in refused(capsys, *HOSTS, "n0,-oProxyCommand=x")
    job = Job(
        name="a", config="c", overrides=(HOSTILE,), nodes=1, processes=1, gpus=True, entry="/e", python="/b/python"
    )
    commands = host_commands(job, out)
    assert [command[0] for command in commands] == ["/b/deepspeed"] * 2
    assert all(command[-1] == HOSTILE for command in commands)


def test_nothing_is_submitted_unless_asked(
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


# --- the processes of a node ---


def node_of(tmp_path: Path, processes: int = 2, **settings: Any) -> Node:
    return Node(nodes=2, processes=processes, rank=1, pids=tmp_path / "pids", **settings)


def python(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_node_numbers_its_processes(tmp_path: Path) -> None:
    names = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"]
    write = f"import os; v = [os.environ[n] for n in {names}]; open('{tmp_path}/' + v[0], 'w').write(' '.join(v))"
    assert node_of(tmp_path).run(python(write), port=123) == 0
    assert [(tmp_path / rank).read_text() for rank in "23"] == ["2 4 0 2 123", "3 4 1 2 123"]


def test_a_node_ends_with_the_first_failure_and_leaves_no_process(tmp_path: Path) -> None:
    body = f"""
import os, subprocess, sys, time
if os.environ['LOCAL_RANK'] == '0':
    while not os.path.exists('{tmp_path}/child'): time.sleep(0.01)
    sys.exit({REQUEUE})
child = subprocess.Popen(['sleep', '600'])
open('{tmp_path}/part', 'w').write(str(child.pid)); os.rename('{tmp_path}/part', '{tmp_path}/child')
time.sleep(600)
"""
    assert node_of(tmp_path, patience_s=0.1).run(python(body), port=1) == REQUEUE
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
        "time.sleep(60)\n"
    )
    pids = tmp_path / "pids"
    words = ["-m", "launcher.scheduling.node", "--nodes", "1", "--processes", "2", "--entry", str(tmp_path)]
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
    assert main(["--nodes", "2"], {"MASTER_PORT": "1"}) == 2
    assert main(["--nodes", "2"], {"MASTER_PORT": "1", "NODE_RANK": "2"}) == 2
    assert "NODE_RANK" in capsys.readouterr().err
