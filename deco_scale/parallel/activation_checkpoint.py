"""Activation checkpointing of blocks, without a wrapper module that would change parameter names."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from deco_scale.models.config import ActivationCheckpointing

_ATEN = torch.ops.aten
_SAVED = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_mm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
}
"""Operations whose results ``selective`` saves; everything else is recomputed."""


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _SAVED else CheckpointPolicy.PREFER_RECOMPUTE


def apply_activation_checkpointing(
    blocks: Iterable[nn.Module], mode: ActivationCheckpointing, *, function: Callable[..., Any] = checkpoint
) -> None:
    """Make each block recompute activations in backward; ``function`` is called as PyTorch's ``checkpoint``."""
    if mode == "none":
        return
    for block in blocks:
        extra: dict[str, Any] = {"use_reentrant": False}
        if mode == "selective":
            extra["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
        block.forward = _checkpointed(block.forward, function, extra)  # type: ignore[method-assign]


def _checkpointed(
    forward: Callable[..., Any], function: Callable[..., Any], extra: dict[str, Any]
) -> Callable[..., Any]:
    """A function, since ``torch.compile`` skips ``functools.partial``, and blocks would run eagerly."""

    def recomputed(*args: Any) -> Any:
        return function(forward, *args, **extra)

    return recomputed
