"""Computations written for speed, each with the plain formula as its twin in the tests."""

from deco_scale.kernels.choice import Kernels, KernelSetting, choose_kernels, use_kernels
from deco_scale.kernels.pixels import BlockWeights, Folded, fold, render_pixels

__all__ = [
    "BlockWeights",
    "Folded",
    "KernelSetting",
    "Kernels",
    "choose_kernels",
    "fold",
    "render_pixels",
    "use_kernels",
]
