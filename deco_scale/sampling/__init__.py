"""From noise and a condition to pictures; the model is a callable here."""

from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.generate import Generator, SampleRequest
from deco_scale.sampling.guidance import Guidance, VelocityFn, guided_velocity
from deco_scale.sampling.samplers import integrate, sample, time_grid

__all__ = [
    "Generator",
    "Guidance",
    "SampleRequest",
    "SamplerConfig",
    "VelocityFn",
    "guided_velocity",
    "integrate",
    "sample",
    "time_grid",
]
