"""Sampling: from noise and a condition to images; the model is a callable."""

from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.generate import ImageGenerator, SampleRequest
from deco_scale.sampling.guidance import Guidance, VelocityFn, guided_velocity
from deco_scale.sampling.samplers import integrate, sample, time_grid

__all__ = [
    "Guidance",
    "ImageGenerator",
    "SampleRequest",
    "SamplerConfig",
    "VelocityFn",
    "guided_velocity",
    "integrate",
    "sample",
    "time_grid",
]
