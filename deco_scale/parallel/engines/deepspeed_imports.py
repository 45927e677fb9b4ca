"""Imports of DeepSpeed and megatron-core, which are optional."""

import os
from typing import Any

import torch

from deco_scale.errors import ConfigError


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed with the accelerator of ``device``, and without the CPU op that would compile for minutes.

    At import DeepSpeed selects one accelerator for the whole process, by itself a GPU if there is one. Raises
    :class:`ConfigError` if DeepSpeed is missing or has selected another accelerator.
    """
    by_user = "DS_ACCELERATOR" in os.environ
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"parallel.engine=deepspeed needs DeepSpeed: pip install 'deco-scale[deepspeed]' ({error})"
        ) from error
    finally:
        if not by_user:
            del os.environ["DS_ACCELERATOR"]
    accelerator = deepspeed.accelerator.get_accelerator().device_name()
    if accelerator != device.type:
        raise ConfigError(
            f"device={device.type}, but DeepSpeed has settled on {accelerator} in this process: set "
            f"DS_ACCELERATOR={device.type} in its environment, or use parallel.engine=fsdp"
        )
    if accelerator == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed("nccl" if accelerator == "cuda" else "gloo", verbose=False)
    return deepspeed


def import_megatron() -> Any:
    """:mod:`megatron_tp`; raises :class:`ConfigError` without megatron-core."""
    try:
        from deco_scale.parallel.engines import megatron_tp
    except ImportError as error:
        raise ConfigError(
            "parallel.engine=deepspeed with parallel.tp > 1 needs megatron-core: "
            f"pip install 'deco-scale[deepspeed]' ({error})"
        ) from error
    return megatron_tp
