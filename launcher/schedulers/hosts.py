"""Hosts reached by ssh: a hostfile, and the ``deepspeed`` launcher's commands."""

from collections.abc import Sequence
from pathlib import Path

from deco_scale.errors import ConfigError
from launcher.schedulers.base import ClusterJob, check_names

TRAIN_PORT, PREFLIGHT_PORT = 29500, 29501
_HOST = r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?"


def render_hostfile(job: ClusterJob, hosts: Sequence[str]) -> str:
    """A line ``host slots=N`` for each host; raises :class:`ConfigError` for wrong or repeated names."""
    check_names(*(("--hosts", host, _HOST, "host names or addresses, with commas between") for host in hosts))
    if len(set(hosts)) != len(hosts) or len(hosts) != job.nodes:
        raise ConfigError(f"--hosts must name {job.nodes} different hosts (--nodes), got {', '.join(hosts)}")
    return "".join(f"{host} slots={job.processes}\n" for host in hosts)


def host_commands(job: ClusterJob, hostfile: Path) -> list[list[str]]:
    """Commands to run one after the other: preflight if asked for, then training."""
    if job.literals or job.references:
        raise ConfigError("--env: deepspeed reads variables from ~/.deepspeed_env on this host; write them there")
    deepspeed = str(Path(job.python).with_name("deepspeed")) if "/" in job.python else "deepspeed"
    programs = {"preflight": PREFLIGHT_PORT, "train": TRAIN_PORT}
    return [
        [deepspeed, "--hostfile", str(hostfile), "--master_port", str(port), *job.command(program)[1:]]
        for program, port in programs.items()
        if program == "train" or job.preflight
    ]
