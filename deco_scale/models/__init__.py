"""Plain single-device models; see denoiser.py."""

from deco_scale.models.denoiser import (
    Denoiser,
    DenoiserOutput,
    ModelConfig,
    ModelKind,
    patchify,
    unpatchify,
)

__all__ = ["Denoiser", "DenoiserOutput", "ModelConfig", "ModelKind", "patchify", "unpatchify"]
