"""Kubernetes manifests: a JobSet, or a PyTorchJob of Kubeflow's training operator, with the configuration inside.

A pod is a node: ``launcher/schedulers/node_agent.py`` starts one process per GPU, forwards SIGTERM and returns the
trainers' exit code.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.observability.events import REQUEUE
from launcher.schedulers.base import ClusterJob, check_names, refuse_secret_text, render_template

PORT = 29500
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_SUBDOMAIN = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_IMAGE = r"[a-z0-9]+([._/:-]+[A-Za-z0-9_]+)*(@sha256:[0-9a-f]{64})?"
_QUANTITY = r"\d+(\.\d+)?(Ki|Mi|Gi|Ti|k|M|G|T)?"
_POD_SUFFIX, _MAX_LABEL = 6, 63
_MAX_CONFIG_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesOptions:
    """Options of ``submit.py k8s``; templates see them as ``k8s``.

    ``secret`` holds the variables that a job names without a value; ``volume`` are volume claims with their mount
    paths, ``CLAIM:/path``. ``shm`` limits /dev/shm; each pod requests ``cpus`` and ``memory``.
    """

    image: str
    kind: Literal["JobSet", "PyTorchJob"] = "JobSet"
    namespace: str | None = None
    secret: str | None = None
    volume: Sequence[str] = ()
    shm: str = "16Gi"
    cpus: str | None = None
    memory: str | None = None

    def __post_init__(self) -> None:
        quantity = "a quantity such as 16Gi"
        volume = "CLAIM:/path, CLAIM of lower-case letters, digits, - and ., the path not ending in /"
        check_names(
            [
                ("--image", self.image, _IMAGE, "registry/name:tag or registry/name@sha256:digest"),
                ("--namespace", self.namespace, _LABEL, "lower-case letters, digits and -"),
                ("--secret", self.secret, _SUBDOMAIN, "lower-case letters, digits, - and ."),
                *(("--volume", each, rf"{_SUBDOMAIN}:/[^\s:]*[^\s:/]", volume) for each in self.volume),
                ("--shm", self.shm, _QUANTITY, quantity),
                ("--memory", self.memory, _QUANTITY, quantity),
                ("--cpus", self.cpus, r"\d+m?", "a number of cores such as 64 or 500m"),
            ]
        )

    @property
    def volumes(self) -> list[tuple[str, str]]:
        """Claims and mount paths."""
        return [(claim, path) for claim, _, path in (each.partition(":") for each in self.volume)]


def render_kubernetes(
    job: ClusterJob, options: KubernetesOptions, cfg: RunConfig, config_text: str, template: Path | None = None
) -> str:
    """ConfigMap and job as one YAML text; raises :class:`ConfigError` for what would not work in a pod."""
    check_names([("--name", job.name, _LABEL, "lower-case letters, digits and -, 63 at most")])
    too_long = len(f"{job.name}-node-0-{job.nodes - 1}") + _POD_SUFFIX - _MAX_LABEL
    if too_long > 0:
        raise ConfigError(f"--name {job.name} is {too_long} characters too long for the names of its pods")
    if job.references and options.secret is None:
        raise ConfigError(
            f"--env {job.references[0]} has no value: name the Secret that contains it with --secret"
        )
    if len(config_text.encode()) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"--config {job.config}: over 1 MiB, the limit of a ConfigMap")
    refuse_secret_text(config_text, file=f"--config {job.config}")
    paths = [path for _, path in options.volumes]
    if not any(cfg.run.dir == path or cfg.run.dir.startswith(f"{path}/") for path in paths):
        raise ConfigError(
            f"run.dir={cfg.run.dir} is on no volume ({', '.join(paths) or 'none given'}), and would vanish with "
            "the pod: give --volume CLAIM:/path, a claim that all nodes share, and run.dir below /path"
        )
    variables = {"config_text": config_text, "requeue_code": REQUEUE, "port": PORT}
    default = f"{options.kind.lower()}.yaml.j2"
    return render_template(template, default, {"job": job, "k8s": options, **variables})
