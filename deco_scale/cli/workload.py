"""What a configuration computes, for the planner: the model, its encoders and how the engine holds weights."""

import dataclasses
from pathlib import Path

from deco_scale.config import RunConfig
from deco_scale.models.config import is_on
from deco_scale.parallel.engines.deepspeed_config import ZERO3_PERSISTENT
from deco_scale.planning.flops import (
    DINOV2_B,
    IMAGE_ENCODER_DIM,
    KNOWN_TEXT_ENCODERS,
    Encoder,
    Workload,
)
from deco_scale.planning.hardware import ENCODER_SHARE


def workload(cfg: RunConfig) -> tuple[Workload, list[str]]:
    """What the configuration computes, and notes on what the plan leaves out."""
    notes: list[str] = []
    encoders: list[Encoder] = []
    is_encoded = cfg.data.has_text_embeddings
    if cfg.text_encoder is not None and (not is_encoded or cfg.samples.every):
        name, tokens = Path(cfg.text_encoder.path).name, cfg.text_encoder.max_tokens
        if name in KNOWN_TEXT_ENCODERS:
            compiled = cfg.text_encoder.compiles("cuda")
            known = KNOWN_TEXT_ENCODERS[name]
            encoders.append(Encoder(name, *known, tokens=tokens, runs=not is_encoded, compiled=compiled))
        else:
            names = ", ".join(KNOWN_TEXT_ENCODERS)
            notes.append(f"text encoder {name!r} is unknown (known: {names}): it is left out")
    repa = cfg.objective.repa_weight > 0
    if repa:
        compiled = cfg.image_encoder is None or is_on(cfg.image_encoder.compile, "cuda")
        encoders.append(dataclasses.replace(DINOV2_B, compiled=compiled))
    zero = cfg.parallel.deepspeed.get("zero_optimization", {})
    work = Workload(
        model=cfg.model,
        compute=cfg.precision.compute,
        repa_dim=IMAGE_ENCODER_DIM if repa else 0,
        fused=cfg.kernels != "torch",
        compile=cfg.compile is not False,
        encoders=tuple(encoders),
        persistent=int(zero.get("stage3_param_persistence_threshold", ZERO3_PERSISTENT)),
        reduce_bucket=int(zero.get("reduce_bucket_size", 500_000_000)),
        prefetch_bucket=int(zero.get("stage3_prefetch_bucket_size", 50_000_000)),
    )
    running = [encoder.name for encoder in encoders if encoder.runs]
    if running:
        notes.append(
            f"encoders in the step: {', '.join(running)}, linears only, at {ENCODER_SHARE[False]:.0%} of the "
            f"datasheet's rate, {ENCODER_SHARE[True]:.0%} compiled (assumed); running ahead they share the GPU "
            "with the step and are counted in full"
        )
    return work, notes
