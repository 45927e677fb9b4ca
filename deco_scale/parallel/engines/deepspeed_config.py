"""DeepSpeed's JSON configuration, generated from ours."""

from typing import Any

import torch

from deco_scale.errors import ConfigError
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.config import ZeroStage
from deco_scale.precision import fp8
from deco_scale.precision.config import PrecisionConfig
from deco_scale.precision.fp8_plan import Fp8Plan

ZERO3_PERSISTENT = 100_000
"""Largest number of elements of a weight that ZeRO-3 keeps full on every rank (DeepSpeed's own default)."""
_LINEARS = ("torch.nn.Linear", "deco_scale.models.layers.PatchEmbed")
_MEGATRON_LINEARS = (
    "deco_scale.parallel.engines.megatron_tp.ColumnLinear",
    "deco_scale.parallel.engines.megatron_tp.RowLinear",
)


def deepspeed_json(
    *,
    device: torch.device,
    stage: ZeroStage,
    tp: int,
    micro_batch: int,
    optimizer: OptimizerConfig,
    precision: PrecisionConfig,
    overrides: dict[str, Any],
    fp8_plan: Fp8Plan | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration; ``overrides`` (the YAML's ``parallel.deepspeed``) are merged over it.

    Gradient accumulation and learning rate belong to the trainer, so DeepSpeed is given neither. Raises
    :class:`ConfigError` for overrides of what the rest of the configuration sets.
    """
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        # Under ZeRO-0 our optimizer clips gradients and checks that they are finite.
        "gradient_clipping": optimizer.clip_norm if stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": stage == 2 and device.type == "cuda",
            "stage3_param_persistence_threshold": ZERO3_PERSISTENT,
            # Release each weight after use, so that memory does not grow with the model.
            "stage3_max_reuse_distance": 0,
        },
    }
    if precision.compute != "fp32":
        linears = [
            *_LINEARS,
            *(_MEGATRON_LINEARS if tp > 1 else ()),
            *([fp8.LINEAR_CLASSES[fp8_plan.choice.backend]] if fp8_plan else ()),
        ]
        generated["torch_autocast"] = {
            "enabled": True,
            "dtype": "bfloat16",
            # Modules whose weights and gradients are communicated in bf16.
            "lower_precision_safe_modules": linears,
        }
    for key in ("managed_gradient_accumulation", "optimizer", "scheduler", "fp16", "bf16"):
        if key in overrides:
            raise ConfigError(f"parallel.deepspeed.{key} is owned by the configuration; remove it")
    return _merged(generated, overrides)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else value
    return out
