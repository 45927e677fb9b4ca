"""The denoisers and their layers as single-device modules, attention backends, frozen encoders."""

from deco_scale.models.config import ModelConfig, ModelKind
from deco_scale.models.denoiser import Denoiser, DenoiserOutput, patchify, unpatchify

__all__ = ["Denoiser", "DenoiserOutput", "ModelConfig", "ModelKind", "patchify", "unpatchify"]
