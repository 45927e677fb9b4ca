"""Kubernetes manifests: only the fields that the public API types name, and words that arrive as given."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from deco_scale.config import load_config
from deco_scale.observability.events import REQUEUE
from deco_scale.yaml import load_yaml
from launcher.schedulers.base import TEMPLATES, yaml_scalar
from tests.support.submission import CONFIG, K8S, VOLUME, refused, rendered


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
    config_map, job = YAML(typ="safe", pure=True).load_all(text)
    resolved = load_yaml(config_map["data"]["config.yaml"], "ConfigMap")
    assert resolved["model"]["dim"] == load_config(CONFIG).model.dim and "base" not in resolved
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
    assert "/etc/deco-scale/config.yaml" in container["command"]


def test_a_jobset_restarts_as_a_whole_and_does_not_count_preemptions(
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


def test_a_template_of_a_user_may_use_the_pod_of_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.j2"
    mine.write_text((TEMPLATES / "jobset.yaml.j2").read_text().replace("replicas: 1", "replicas: 1  # mine"))
    plain = rendered(capsys, *K8S, *VOLUME)
    assert rendered(capsys, *K8S, *VOLUME, "--template", str(mine)) == plain.replace(
        "replicas: 1", "replicas: 1  # mine"
    )


@given(text=st.text())
def test_any_text_is_one_yaml_scalar(text: str) -> None:
    assert load_yaml(f"{{ a: {yaml_scalar(text)} }}", "manifest") == {"a": text}


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
