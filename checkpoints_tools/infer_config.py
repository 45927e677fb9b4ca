"""Infer a model's settings from its tensors' names and shapes, in our names or in the release's."""

import dataclasses
import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, TensorSpec
from checkpoints_tools.formats import release
from deco_scale.checkpoint.format import Shapes, check_shapes
from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser, ModelConfig


def infer_complete_model(
    specs: Mapping[str, TensorSpec], stated: Mapping[str, Any] | None, *, where: str
) -> ModelConfig:
    """Settings of the denoiser in canonical tensors, which must be complete for it.

    ``stated`` (a configuration's ``model`` section) must agree. Raises :class:`ConfigError` naming the key.
    """
    shapes = _shapes_of(specs, MODEL) or _shapes_of(specs, EMA)
    cfg = infer_model(shapes, where=where, stated=stated)
    check_shapes(shapes, denoiser_shapes(cfg), where=where)
    return cfg


def check_sets(specs: Mapping[str, TensorSpec], stated: Mapping[str, Any] | None, *, where: str) -> ModelConfig:
    """Settings of the model in canonical tensors, all of whose sets must be complete for it."""
    cfg = infer_complete_model(specs, stated, where=where)
    check_repa_head(_shapes_of(specs, REPA), cfg.dim, where=f"{where} ({REPA}*)")
    weights, denoiser = _shapes_of(specs, "model."), denoiser_shapes(cfg)
    ema = {EMA.removeprefix("ema.") + name: shape for name, shape in denoiser.items()}
    for prefix, expected in ((MODEL, denoiser), ("ema.", ema), ("exp_avg.", weights), ("exp_avg_sq.", weights)):
        actual = _shapes_of(specs, prefix)
        if actual:
            check_shapes(actual, expected, where=f"{where} ({prefix}*)")
    return cfg


def check_fits_fp32(specs: Mapping[str, TensorSpec], path: object) -> None:
    """Raise :class:`ConfigError` naming a tensor whose type fp32 cannot hold."""
    for name, spec in specs.items():
        if not spec.dtype.is_floating_point or spec.dtype.itemsize > 4:
            raise ConfigError(f"{path}: {name} is {spec.dtype}, which fp32 cannot represent")


def check_repa_head(shapes: Shapes, dim: int, *, where: str) -> None:
    """Raise :class:`ConfigError` if ``shapes`` (names without prefix) are not a REPA head; having none is fine."""
    if shapes:
        check_shapes(shapes, repa_shapes(dim, (shapes.get("layers.4.weight") or (0,))[0]), where=where)


def infer_model(shapes: Shapes, *, where: str, stated: Mapping[str, Any] | None = None) -> ModelConfig:
    """Settings of a denoiser with these tensors (names without prefix, ours or the release's).

    The number of heads comes from the length of the q-norm, the patch size from the embedding, and so on. The
    baseline's tensors give only channels x patch_size^2; three channels are assumed unless ``stated`` has others.
    Compare the result with :func:`check_shapes`. Raises :class:`ConfigError` naming ``where``.
    """

    def size(dimension: int, *names: str) -> int:
        for name in names:
            if name in shapes and len(shapes[name]) > dimension:
                return shapes[name][dimension]
        raise ConfigError(f"{where} is no DeCo model: it has no tensor {' or '.join(names)} of a fitting shape")

    embed = ("patch_embed.weight", "s_embedder.proj.weight", "x_embedder.proj.weight")
    dim, patch_values = size(0, *embed), size(1, *embed)
    head_dim = size(0, "blocks.0.attn.q_norm.weight")
    settings: dict[str, Any] = {
        "dim": dim,
        "num_heads": dim // head_dim if head_dim else 0,
        "num_blocks": _count(shapes, "blocks", where),
    }
    if "text_embed.position" in shapes or "y_pos_embedding" in shapes:
        settings |= {
            "kind": "t2i_deco",
            "num_text_blocks": _count(shapes, "(?:text_blocks|text_refine_blocks)", where),
            "text_dim": size(1, "text_embed.proj.weight", "y_embedder.proj.weight"),
            "text_tokens": size(1, "text_embed.position", "y_pos_embedding"),
        }
    else:
        is_baseline = "final.head.weight" in shapes or "final_layer.linear.weight" in shapes
        settings["kind"] = "c2i_baseline" if is_baseline else "c2i_deco"
        settings["num_classes"] = size(0, "label_embed.table.weight", "y_embedder.embedding_table.weight") - 1
    if settings["kind"] == "c2i_baseline":
        channels, side = (stated or {}).get("channels", 3), (stated or {}).get("patch_size", 16)
        fits = isinstance(channels, int) and isinstance(side, int) and channels * side * side == patch_values
        settings["channels"] = channels if fits else 3
    else:
        settings["channels"] = size(0, "decoder.head.weight", "dec_net.final_layer.linear.weight")
        settings["decoder_width"] = size(0, "decoder.input_proj.weight", "dec_net.input_proj.weight")
        settings["decoder_blocks"] = _count(shapes, r"(?:decoder\.blocks|dec_net\.res_blocks)", where)
    settings["patch_size"] = isqrt(patch_values // max(1, settings["channels"]))
    try:
        cfg = ModelConfig(**settings)
    except ValueError as error:
        raise ConfigError(f"{where}: its tensors do not describe a valid model: {error}") from error
    for key, value in dataclasses.asdict(cfg).items():
        if stated is not None and stated.get(key, value) != value:
            raise ConfigError(
                f"model.{key}={stated[key]} of the configuration contradicts {where}, whose tensors give {value}"
            )
    return cfg


def denoiser_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names (without prefix) and shapes of a denoiser's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in meta_state(cfg).items()}


def release_shapes(cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same in the release's names."""
    return {n: tuple(t.shape) for n, t in release.denoiser_to_release(meta_state(cfg), cfg).items()}


def meta_state(cfg: ModelConfig) -> dict[str, Tensor]:
    """A denoiser's tensors without data."""
    try:
        with torch.device("meta"):
            return dict(Denoiser(cfg).state_dict())
    except RuntimeError as error:
        raise ConfigError(f"a model of these sizes cannot be built: {error}") from error


def repa_shapes(dim: int, encoder_dim: int) -> dict[str, tuple[int, ...]]:
    """Names (without prefix) and shapes of the REPA head."""
    sizes = {0: (dim, dim), 2: (dim, dim), 4: (encoder_dim, dim)}
    weights = {f"layers.{i}.weight": shape for i, shape in sizes.items()}
    return weights | {f"layers.{i}.bias": shape[:1] for i, shape in sizes.items()}


def _shapes_of(specs: Mapping[str, TensorSpec], prefix: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors with ``prefix``, by their names without it."""
    return {n.removeprefix(prefix): s.shape for n, s in specs.items() if n.startswith(prefix)}


def _count(shapes: Shapes, pattern: str, where: str) -> int:
    """Number of blocks, which must be numbered from 0 without gaps."""
    matches = (re.match(rf"{pattern}\.(\d{{1,6}})\.", name) for name in shapes)
    numbers = {int(match[1]) for match in matches if match}
    if numbers and max(numbers) != len(numbers) - 1:
        missing = next(i for i in range(len(numbers)) if i not in numbers)
        raise ConfigError(f"{where}: the tensors of block {missing} ({pattern}) are missing")
    return len(numbers)
