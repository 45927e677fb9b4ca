"""Kubernetes manifests: a JobSet, or a PyTorchJob of Kubeflow's training operator, with the configuration inside.

A pod is a node: ``launcher/schedulers/node_agent.py`` starts one process per GPU, forwards SIGTERM and returns the
trainers' exit code.
"""

import argparse

from deco_scale.config import RunConfig, dump_config
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


def add_kubernetes_options(parser: argparse.ArgumentParser) -> None:
    """Options of ``submit.py k8s``; templates see them as ``k8s``."""
    option = parser.add_argument
    option("--image", required=True, help="container image")
    option("--kind", choices=["JobSet", "PyTorchJob"], default="JobSet")
    option("--namespace")
    option("--secret", help="Secret that contains each --env NAME without a value")
    option(
        "--volume", action="append", default=[], metavar="CLAIM:/path", help="mount this persistent volume claim"
    )
    option("--shm", default="16Gi", help="size limit of /dev/shm")
    option("--cpus", help="cores that a pod requests")
    option("--memory", help="memory limit of a pod")


def render_kubernetes(job: ClusterJob, options: argparse.Namespace, cfg: RunConfig) -> str:
    """ConfigMap and job as one YAML text; raises :class:`ConfigError` for what would not work in a pod."""
    quantity = "a quantity such as 16Gi"
    volume = "CLAIM:/path, CLAIM of lower-case letters, digits, - and ., the path not ending in /"
    check_names(
        ("--image", options.image, _IMAGE, "registry/name:tag or registry/name@sha256:digest"),
        ("--namespace", options.namespace, _LABEL, "lower-case letters, digits and -"),
        ("--secret", options.secret, _SUBDOMAIN, "lower-case letters, digits, - and ."),
        *(("--volume", each, rf"{_SUBDOMAIN}:/[^\s:]*[^\s:/]", volume) for each in options.volume),
        ("--shm", options.shm, _QUANTITY, quantity),
        ("--memory", options.memory, _QUANTITY, quantity),
        ("--cpus", options.cpus, r"\d+m?", "a number of cores such as 64 or 500m"),
        ("--name", job.name, _LABEL, "lower-case letters, digits and -, 63 at most"),
    )
    too_long = len(f"{job.name}-node-0-{job.nodes - 1}") + _POD_SUFFIX - _MAX_LABEL
    if too_long > 0:
        raise ConfigError(f"--name {job.name} is {too_long} characters too long for the names of its pods")
    if job.references and options.secret is None:
        raise ConfigError(
            f"--env {job.references[0]} has no value: name the Secret that contains it with --secret"
        )
    # Resolved: files that the configuration names as its base are not in the pod.
    config_text = dump_config(cfg)
    if len(config_text.encode()) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"--config {job.config}: over 1 MiB, the limit of a ConfigMap")
    refuse_secret_text(config_text, file=f"--config {job.config}")
    volumes = [each.split(":") for each in options.volume]
    paths = [path for _, path in volumes]
    if not any(cfg.run.dir == path or cfg.run.dir.startswith(f"{path}/") for path in paths):
        raise ConfigError(
            f"run.dir={cfg.run.dir} is on no volume ({', '.join(paths) or 'none given'}), and would vanish with "
            "the pod: give --volume CLAIM:/path, a claim that all nodes share, and run.dir below /path"
        )
    k8s = {**vars(options), "volumes": volumes}
    variables = {"k8s": k8s, "config_text": config_text, "requeue_code": REQUEUE, "port": PORT}
    return render_template(options.template, f"{options.kind.lower()}.yaml.j2", {"job": job, **variables})
