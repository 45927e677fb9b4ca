"""How sure a prediction is: the range of each assumption, what it does to a step, and published runs beside it.

Each assumption is moved to both ends of its range while the others stay; the changes of the step are independent,
so they add up as squares.
"""

import dataclasses
import math
from typing import NamedTuple

from deco_scale.planning.forecast import StageForecast
from deco_scale.planning.hardware import Device
from deco_scale.planning.step_time import step_by_part


class Assumption(NamedTuple):
    """Fields of :class:`Device` and the factors that they may be off by: to the fast side, and to the slow one."""

    what: str
    fields: tuple[str, ...]
    fast: float
    slow: float


ASSUMPTIONS = (
    Assumption("GEMM rates by shape", ("gemm_flops", "fp8_flops"), 1.1, 0.85),
    Assumption("attention's rate", ("attention_flops",), 1.4, 0.7),
    Assumption("what memory-bound parts reach of a copy", ("copy_bytes_per_s",), 1.05, 0.75),
    Assumption("host time", ("host_scale",), 1 / 1.5, 1.5),
    Assumption("encoders' rate", ("encoder_flops",), 1.3, 0.75),
    Assumption("bandwidth of links", ("link_bytes_per_s", "network_bytes_per_s"), 1.15, 0.7),
    Assumption("latency of collectives", ("latency_scale",), 1 / 1.5, 2.0),
)
MEASURED_GEMM = Assumption("GEMM rates by shape, measured", ("gemm_flops",), 1.03, 0.95)
MEMORY_SHARE = 0.15
"""What activations and buffers may be off by; state is exact."""
STATE = ("weights", "masters", "gradients", "moments", "average")


class Range(NamedTuple):
    """A step's seconds at best and at worst, and seconds that each assumption may add."""

    low_s: float
    high_s: float
    slower_s: dict[str, float]


def step_range(forecast: StageForecast, device: Device) -> Range:
    """The range of one stage's predicted step."""
    step, likely = forecast.step, forecast.step_s
    faster, slower = [], {}
    for each in ASSUMPTIONS:
        if device.gemm_corrections and "gemm_flops" in each.fields and step.work.compute != "fp8":
            each = MEASURED_GEMM
        fast, slow = (sum(step_by_part(step, _moved(device, each, f)).values()) for f in (each.fast, each.slow))
        faster.append(max(likely - fast, 0.0))
        slower[each.what] = max(slow - likely, 0.0)
    return Range(likely - math.hypot(*faster), likely + math.hypot(*slower.values()), slower)


def _moved(device: Device, assumption: Assumption, factor: float) -> Device:
    values = {name: getattr(device, name) for name in assumption.fields}
    return dataclasses.replace(device, **{name: v * factor for name, v in values.items() if v is not None})


def memory_range(forecast: StageForecast) -> tuple[float, float]:
    """Bytes of a GPU at best and at worst."""
    uncertain = MEMORY_SHARE * sum(size for part, size in forecast.memory.items() if part not in STATE)
    return forecast.memory_bytes - uncertain, forecast.memory_bytes + uncertain


class Published(NamedTuple):
    """MFU of comparable runs in bf16, as their authors state it."""

    what: str
    low: float
    high: float


PUBLISHED = (
    Published("the public release of DeCo-XXL, 6 days on 8 H800", 0.13, 0.15),
    Published("torchtitan, Llama 3.1 8B by FSDP2 and compile on H100 (arXiv 2410.06511)", 0.33, 0.39),
    Published("Megatron-LM, 2B to 462B on H100 (its README)", 0.41, 0.48),
)


def compared(mfu: float) -> str:
    """Where an MFU lies among published ones, in words."""
    highest = max(PUBLISHED, key=lambda each: each.high)
    if mfu > highest.high:
        return f"{mfu:.0%} is above every published figure here: doubt it until a GPU has measured it"
    above = [each.what.split(",")[0] for each in PUBLISHED if mfu > each.high]
    return f"{mfu:.0%} is {'above ' + ' and '.join(above) if above else 'above none of them'}"
