"""The configuration whose sizes the GPU suite measures, and the tiny ones that it takes where quick."""

import dataclasses
from typing import Any

from benchmarks.jobs.runner import Where
from benchmarks.record import ROOT
from deco_scale.config import RunConfig

XXL = ROOT / "configs" / "t2i_xxl.yaml"
TINY = (
    "model.dim=64", "model.num_heads=4", "model.num_blocks=2", "model.num_text_blocks=1", "model.decoder_width=8",
    "model.decoder_blocks=1", "model.text_dim=32", "model.text_tokens=16", "text_encoder.max_tokens=16",
    "objective.repa_layer=1",
)  # fmt: skip
"""Sizes where quick: they show that the machinery works, and nothing about speed."""
TINY_SIDE = {256: 32, 512: 64}
TINY_CEILINGS = {"side": 256, "size": 1 << 20}
"""Sizes of the product and the copy of :func:`benchmarks.measure.measure_ceilings`."""


def overrides_of(where: Where) -> tuple[str, ...]:
    """What makes the XXL configuration tiny, where sizes are."""
    return TINY if where.quick else ()


def one_stage(cfg: RunConfig, **fields: Any) -> RunConfig:
    """``cfg`` with its first stage alone, and ``fields`` of that changed."""
    return dataclasses.replace(cfg, stages=(dataclasses.replace(cfg.stages[0], **fields),))
