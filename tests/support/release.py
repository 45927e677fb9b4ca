"""A state dict of the public release as ours, for the parity tests."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpoints_tools.formats.release import denoiser_rules
from deco_scale.models import ModelConfig


def denoiser_from_release(state: Mapping[str, Tensor], cfg: ModelConfig) -> dict[str, Tensor]:
    """Our names for a release denoiser without prefix; each tensor must be accounted for.

    Raises ``ValueError`` naming the missing and the unexpected tensors.
    """
    rules = denoiser_rules(cfg)
    missing = sorted({r.release for r in rules} - set(state))
    unexpected = sorted(set(state) - {r.release for r in rules})
    if missing or unexpected:
        raise ValueError(f"release weights do not fit: missing {missing}, unexpected {unexpected}")
    ours: dict[str, Tensor] = {}
    for rule in rules:
        ours.update(zip(rule.ours, rule.split(state[rule.release], cfg), strict=True))
    return ours


def repa_from_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our REPA head names for the release's projector without prefix."""
    return {f"layers.{name}": tensor for name, tensor in state.items()}


def repa_to_release(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inverse of :func:`repa_from_release`."""
    return {re.sub(r"^layers\.", "", name): tensor for name, tensor in state.items()}


def model_config_from_release(kind: str, args: Mapping[str, Any]) -> ModelConfig:
    """Our settings for the release's constructor arguments (``num_groups`` is the number of heads)."""
    common = {
        "dim": args["hidden_size"],
        "num_heads": args["num_groups"],
        "patch_size": args["patch_size"],
        "channels": args["in_channels"],
    }
    if kind == "t2i_deco":
        return ModelConfig(
            kind="t2i_deco",
            num_blocks=args["num_encoder_blocks"],
            num_text_blocks=args["num_text_blocks"],
            decoder_width=args["decoder_hidden_size"],
            decoder_blocks=args["num_decoder_blocks"],
            text_dim=args["txt_embed_dim"],
            text_tokens=args["txt_max_length"],
            **common,
        )
    if kind == "c2i_deco":
        return ModelConfig(
            kind="c2i_deco",
            num_blocks=args["num_cond_blocks"],
            decoder_width=args["hidden_size_x"],
            decoder_blocks=args["num_blocks"] - args["num_cond_blocks"],
            num_classes=args["num_classes"],
            **common,
        )
    if kind == "c2i_baseline":
        return ModelConfig(
            kind="c2i_baseline",
            num_blocks=args["num_blocks"],
            num_classes=args["num_classes"],
            **common,
        )
    raise ValueError(f"unknown model kind {kind!r}")
