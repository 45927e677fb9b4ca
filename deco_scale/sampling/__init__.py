"""Sampling: from noise and a condition to images; the model is a callable."""

from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.generate import ImageGenerator, SampleRequest
from deco_scale.sampling.guidance import VelocityFn
from deco_scale.sampling.samplers import sample, time_grid

__all__ = ["ImageGenerator", "SampleRequest", "SamplerConfig", "VelocityFn", "sample", "time_grid"]
