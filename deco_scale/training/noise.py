"""Random numbers of samples: time, condition dropout and noise. Shape letters: B batch, C channels, Y X pixels."""

from typing import NamedTuple

import torch
from torch import Tensor

from deco_scale.seeding import derive_seed


class SampleDraws(NamedTuple):
    """Random numbers that belong to a sample, not to a rank.

    ``normal`` (B,) and ``uniform`` (B,) for the time, ``dropout`` (B,) in [0, 1), ``noise`` (B, C, Y, X). Each is
    drawn from a generator keyed by (seed, number of the sample in the run), so a sample meets the same on any
    rank, before and after a resume, under any engine. CPU and GPU generators differ: a trace is reproduced on the
    same kind of device.
    """

    normal: Tensor
    uniform: Tensor
    dropout: Tensor
    noise: Tensor


def draw(seed: int, numbers: list[int], shape: tuple[int, int, int], device: torch.device) -> SampleDraws:
    """Draws of the samples with these numbers, on ``device``; one generator, reseeded per sample."""
    generator = torch.Generator(device)
    count = len(numbers)
    normal, uniform = torch.empty(count, device=device), torch.empty(count, 2, device=device)
    noise = torch.empty(count, *shape, device=device)
    for row, number in enumerate(numbers):
        generator.manual_seed(derive_seed(seed, number))
        uniform[row].uniform_(generator=generator)
        normal[row : row + 1].normal_(generator=generator)
        noise[row].normal_(generator=generator)
    return SampleDraws(normal, uniform[:, 0], uniform[:, 1], noise)
