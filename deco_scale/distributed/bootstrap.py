"""Rank, world size and device of this process, and initialisation of the process group.

``deepspeed`` and ``torchrun`` set RANK, WORLD_SIZE and LOCAL_RANK, ``srun`` its own variables; without any of
them, this is the only process.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from deco_scale.errors import ConfigError, RunError

TIMEOUT = timedelta(minutes=30)


class Environment(NamedTuple):
    """Ranks of this process, and the number of processes."""

    rank: int
    world_size: int
    local_rank: int


def read_environment(variables: Mapping[str, str]) -> Environment:
    """Environment from the launcher's variables; raises :class:`ConfigError` for impossible values."""
    for names in (("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")):
        if names[0] in variables and names[1] in variables:
            try:
                environment = Environment(*(int(variables.get(name, "0")) for name in names))
            except ValueError as error:
                raise ConfigError(f"{'/'.join(names)} are not numbers: {error}") from error
            if not 0 <= environment.rank < environment.world_size:
                raise ConfigError(f"{names[0]}={environment.rank} with {names[1]}={environment.world_size}")
            return environment
    return Environment(0, 1, 0)


def set_cuda_defaults(variables: MutableMapping[str, str]) -> None:
    """Settings that CUDA and NCCL read when they start, where the user has set none; no GPU has run them yet.

    The allocator grows segments instead of fragmenting, and NCCL's streams have high priority, so that
    collectives start beside running kernels. As variables they reach every process group, also DeepSpeed's.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & variables.keys():
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    variables.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")


def choose_device(setting: str, local_rank: int) -> torch.device:
    """The device of ``setting``: ``cpu``, ``cuda`` (the local rank's GPU), or ``auto`` (a GPU if there is one)."""
    if setting == "cpu" or (setting == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda, but PyTorch sees no GPU here; use device=auto or cpu")
    gpus = torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"local rank {local_rank}, but this node has {gpus} GPUs: start fewer processes per node"
        )
    return torch.device("cuda", local_rank)


def init_distributed(env: Environment, device: torch.device) -> None:
    """Join the process group, unless the caller already has one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # By default each process uses all cores, and several on one machine would compete for them.
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", env.world_size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    if dist.is_initialized():
        return
    _check_restarts(os.environ)
    os.environ.setdefault("MASTER_ADDR", _slurm_head() or "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", str(_free_port() if env.world_size == 1 else 29500))
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(env.rank), str(env.world_size)
    os.environ["LOCAL_RANK"] = str(env.local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError, dist.DistError) as error:
        raise RunError(f"the processes could not connect to each other: {error}") from error


def _check_restarts(variables: Mapping[str, str]) -> None:
    """Refuse torchrun's restarts with a shared store: gloo would find addresses of processes that have ended."""
    shared = variables.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(variables.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise ConfigError(
            "torchrun --max-restarts uses one store for all attempts, from which PyTorch reads the addresses of "
            "the attempt before: no restart would succeed. Start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, on every node"
        )


def _slurm_head() -> str | None:
    """First host of SLURM's list, ``node[03-05],other`` giving ``node03``."""
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", os.environ.get("SLURM_JOB_NODELIST", ""))
    return first[1] + (first[2] or "") if first else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
