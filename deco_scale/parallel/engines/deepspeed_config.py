"""DeepSpeed: its import, which is optional, and its JSON configuration, generated from ours."""

import functools
import os
from typing import Any

import torch

from deco_scale.errors import ConfigError
from deco_scale.parallel.engines.base import EngineSettings
from deco_scale.precision import fp8
from deco_scale.yaml import merged

ZERO3_PERSISTENT = 100_000
"""Largest number of elements of a weight that ZeRO-3 keeps full on every rank (DeepSpeed's own default)."""
DEFAULT_LIVE = 1_000_000_000
"""Elements of gathered weights beyond which ZeRO-3 does not prefetch (DeepSpeed's own default)."""
_ALL = 10**15
_LINEARS = ("torch.nn.Linear", "deco_scale.models.layers.PatchEmbed")
_MEGATRON_LINEARS = (
    "deco_scale.parallel.engines.megatron_tp.ColumnLinear",
    "deco_scale.parallel.engines.megatron_tp.RowLinear",
)


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
    selected = deepspeed.accelerator.get_accelerator()
    accelerator = selected.device_name()
    if accelerator != device.type:
        raise ConfigError(
            f"device={device.type}, but DeepSpeed has settled on {accelerator} in this process: set "
            f"DS_ACCELERATOR={device.type} in its environment, or use parallel.engine=fsdp"
        )
    if accelerator == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if not hasattr(selected.device_count, "cache_info"):
            # It would start numactl at every reduction of gradients.
            selected.device_count = functools.cache(selected.device_count)
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


def deepspeed_json(settings: EngineSettings) -> dict[str, Any]:
    """DeepSpeed's configuration; ``overrides`` (the YAML's ``parallel.deepspeed``) are merged over it.

    Gradient accumulation and learning rate belong to the trainer, so DeepSpeed is given neither. Raises
    :class:`ConfigError` for overrides of what the rest of the configuration sets.
    """
    stage, plan = settings.zero_stage, settings.fp8_plan
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Under ZeRO-0 our optimizer clips gradients and checks that they are finite.
        "gradient_clipping": settings.optimizer.clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            # Gradients are reduced, and weights gathered, in streams of their own; no GPU has run it with ZeRO-3.
            "overlap_comm": stage >= 2 and settings.device.type == "cuda",
            "stage3_param_persistence_threshold": ZERO3_PERSISTENT,
            # Release each weight after use, so that memory does not grow with the model, or after its backward.
            "stage3_max_reuse_distance": 0 if settings.reshard_after_forward else _ALL,
            "stage3_max_live_parameters": DEFAULT_LIVE if settings.reshard_after_forward else _ALL,
            # Its own F.linear, which compiled blocks cannot trace, saves no weight for backward:
            # that frees memory only if weights are released.
            "memory_efficient_linear": settings.reshard_after_forward and not settings.compile_blocks,
        },
    }
    if settings.precision.compute != "fp32":
        linears = [*_LINEARS, *(_MEGATRON_LINEARS if settings.dims.tp > 1 else ())]
        if plan is not None:
            linears.append(fp8.LINEAR_CLASSES[plan.choice.backend])
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # Modules whose weights and gradients are communicated in bf16.
            "lower_precision_safe_modules": linears,
        }
    for key in ("managed_gradient_accumulation", "optimizer", "scheduler", "fp16", "bf16"):
        if key in settings.overrides:
            raise ConfigError(f"parallel.deepspeed.{key} is owned by the configuration; remove it")
    return merged(generated, settings.overrides)  # type: ignore[no-any-return]
