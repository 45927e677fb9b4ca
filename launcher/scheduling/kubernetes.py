"""Kubernetes manifests: a JobSet, or a PyTorchJob of Kubeflow's training operator, with the configuration inside.

Field names are those of jobset.x-k8s.io/v1alpha2, kubeflow.org/v1 (training operator) and batch/v1.

A pod is a node: ``launcher/scheduling/node.py`` starts one process per GPU, hands SIGTERM on and returns the
trainers' exit code. Under a JobSet the pods fail together and start again together; what was told to stop
(``REQUEUE``, or a pod that the cluster disrupted) is not counted against ``max_restarts``.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.watching.events import REQUEUE
from launcher.scheduling.credentials import refuse_secret_text
from launcher.scheduling.job import Job, check_name

LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
SUBDOMAIN = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
IMAGE = r"[a-z0-9]+([._/:-]+[A-Za-z0-9_]+)*(@sha256:[0-9a-f]{64})?"
QUANTITY = r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?"
CONTAINER = "pytorch"
CONFIG_FOLDER = "/etc/deco-scale"
PORT = 29500
_REPLICATED = "node"
_POD_SUFFIX = 6
_MAX_LABEL = 63
_MAX_CONFIG_BYTES = 2**20

Kind = Literal["JobSet", "PyTorchJob"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesOptions:
    """``secret`` holds the variables that a job names without a value; ``claims`` are volume claims by mount path.

    ``shared_memory`` bounds /dev/shm; ``cpus`` and ``memory`` are requested by each pod.
    """

    image: str
    kind: Kind = "JobSet"
    namespace: str | None = None
    secret: str | None = None
    claims: tuple[tuple[str, str], ...] = ()
    shared_memory: str = "16Gi"
    cpus: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        check_name(self.image, IMAGE, option="--image", allowed="registry/name:tag or registry/name@sha256:digest")
        if self.namespace is not None:
            check_name(self.namespace, LABEL, option="--namespace", allowed="small letters, digits and -")
        if self.secret is not None:
            check_name(self.secret, SUBDOMAIN, option="--secret", allowed="small letters, digits, - and .")
        for claim, path in self.claims:
            check_name(
                claim, SUBDOMAIN, option="--volume", allowed="CLAIM:/path with small letters, digits, - and ."
            )
            check_name(path, r"/[^\s:]*[^\s:/]", option="--volume", allowed="CLAIM:/path, not ending in /")
        for option, value in (("--shm", self.shared_memory), ("--memory", self.memory)):
            if value is not None:
                check_name(value, QUANTITY, option=option, allowed="a quantity such as 16Gi")
        if self.cpus is not None:
            check_name(self.cpus, r"\d+m?", option="--cpus", allowed="a number of cores such as 64 or 500m")


def render_kubernetes(job: Job, options: KubernetesOptions, cfg: RunConfig, config_text: str) -> str:
    """ConfigMap and job as one YAML text; raises :class:`ConfigError` for what would not work in a pod."""
    check_name(job.name, LABEL, option="--name", allowed="small letters, digits and -, 63 at most")
    longest = len(f"{job.name}-{_REPLICATED}-0-{job.nodes - 1}") + _POD_SUFFIX
    if longest > _MAX_LABEL:
        raise ConfigError(
            f"--name {job.name} is {longest - _MAX_LABEL} characters too long for the names of its pods"
        )
    if job.references and options.secret is None:
        raise ConfigError(f"--env {job.references[0]} has no value: --secret names the Secret that holds it")
    if len(config_text.encode()) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"--config {job.config}: over 1 MiB, which a ConfigMap does not hold")
    refuse_secret_text(config_text, where=f"--config {job.config}")
    _check_run_folder(options, cfg)
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(f"{job.name}-config", options),
        "data": {"config.yaml": config_text},
    }
    manifest = _jobset(job, options) if options.kind == "JobSet" else _pytorchjob(job, options)
    return yaml.dump_all([config_map, manifest], Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Writes what occurs twice twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _check_run_folder(options: KubernetesOptions, cfg: RunConfig) -> None:
    paths = [path for _, path in options.claims]
    if not any(cfg.run.dir == path or cfg.run.dir.startswith(f"{path}/") for path in paths):
        raise ConfigError(
            f"run.dir={cfg.run.dir} is on no volume ({', '.join(paths) or 'none given'}), and would vanish with "
            "the pod: give --volume CLAIM:/path, a claim that all nodes share, and run.dir below /path"
        )


def _metadata(name: str, options: KubernetesOptions) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if options.namespace is not None:
        found["namespace"] = options.namespace
    return {**found, "labels": {"app.kubernetes.io/name": "deco-scale"}}


def _jobset(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    address = f"{job.name}-{_REPLICATED}-0-0.{job.name}"
    variables = {"MASTER_ADDR": address, "MASTER_PORT": str(PORT)}
    stopped = {"action": "FailJob", "onExitCodes": _on_exit(REQUEUE)}
    disrupted = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    spec = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        # The first pod that fails ends the job; the JobSet starts all of them again.
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [stopped, disrupted]},
        "template": {"spec": _pod(job, options, variables, rank_from="JOB_COMPLETION_INDEX", restart="Never")},
    }
    uncounted = {
        "name": "toldToStop",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job.name, options),
        "spec": {
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "failurePolicy": {"maxRestarts": job.max_restarts, "rules": [uncounted]},
            "replicatedJobs": [{"name": _REPLICATED, "replicas": 1, "template": {"spec": spec}}],
        },
    }


def _on_exit(code: int) -> dict[str, Any]:
    return {"containerName": CONTAINER, "operator": "In", "values": [code]}


def _pytorchjob(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    """The operator sets MASTER_ADDR, MASTER_PORT and, as RANK, the number of the pod."""
    # ExitCode would take 75 for a permanent error: the operator retries codes from 128 on.
    pod = _pod(job, options, {}, rank_from="RANK", restart=None)
    pod["containers"][0]["ports"] = [{"name": "pytorchjob-port", "containerPort": PORT}]
    template = {"spec": pod}
    replicas = {"Master": {"replicas": 1, "restartPolicy": "OnFailure", "template": template}}
    if job.nodes > 1:
        replicas["Worker"] = {"replicas": job.nodes - 1, "restartPolicy": "OnFailure", "template": template}
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job.name, options),
        "spec": {
            "runPolicy": {"cleanPodPolicy": "Running", "backoffLimit": job.max_restarts},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _pod(
    job: Job, options: KubernetesOptions, variables: dict[str, str], *, rank_from: str, restart: str | None
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
        {"name": "config", "configMap": {"name": f"{job.name}-config"}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "shared-memory", "mountPath": "/dev/shm"},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
    ]
    for number, (claim, path) in enumerate(options.claims):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": path})
    probe = [job.python, "-m", "launcher.scheduling.node", "--probe"]
    container = {
        "name": CONTAINER,
        "image": options.image,
        "workingDir": job.entry,
        "command": [_literal(word) for word in _node_command(job, rank_from)],
        "env": _environment(job, options, variables),
        "resources": _resources(job, options),
        # Batch work serves nobody, so there is no readiness: alive means that every trainer process runs.
        "startupProbe": {
            "exec": {"command": probe}, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 30,
        },
        "livenessProbe": {
            "exec": {"command": probe}, "periodSeconds": 30, "timeoutSeconds": 10, "failureThreshold": 4,
        },
        "volumeMounts": mounts,
    }  # fmt: skip
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": job.grace_s,
        "containers": [container],
        "volumes": volumes,
    }
    if restart is not None:
        pod["restartPolicy"] = restart
    return pod


def _node_command(job: Job, rank_from: str) -> list[str]:
    words = [job.python, "-m", "launcher.scheduling.node", "--nodes", str(job.nodes)]
    words += ["--processes", str(job.processes), "--node-rank-from", rank_from]
    words += ["--preflight"] if job.preflight else []
    return [*words, "--", "--config", f"{CONFIG_FOLDER}/config.yaml", *job.overrides]


def _environment(job: Job, options: KubernetesOptions, variables: dict[str, str]) -> list[dict[str, Any]]:
    plain = {**variables, **dict(job.literals)}
    found: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in plain.items()]
    for name in job.references:
        found.append({"name": name, "valueFrom": {"secretKeyRef": {"name": options.secret, "key": name}}})
    return found


def _resources(job: Job, options: KubernetesOptions) -> dict[str, Any]:
    limits: dict[str, Any] = {"nvidia.com/gpu": job.processes} if job.gpus else {}
    if options.memory is not None:
        limits["memory"] = options.memory
    requests = {"cpu": options.cpus} if options.cpus is not None else {}
    return {name: values for name, values in (("limits", limits), ("requests", requests)) if values}


def _literal(text: str) -> str:
    """Kubernetes replaces ``$(NAME)`` in commands and values; a doubled dollar keeps it as it is."""
    return re.sub(r"\$(?=[$(])", "$$", text)
