"""The models, for a single device."""

from deco_scale.models.config import ModelConfig, ModelKind
from deco_scale.models.denoiser import Denoiser, DenoiserOutput, patchify, unpatchify

__all__ = ["Denoiser", "DenoiserOutput", "ModelConfig", "ModelKind", "patchify", "unpatchify"]
