"""Computations written for speed, each with the plain formula as its twin in the tests."""

from deco_scale.kernels.config import KernelSetting
from deco_scale.kernels.pixel_decoder import BlockWeights, Folded, fold, render_pixels
from deco_scale.kernels.select import Kernels, choose_kernels, use_kernels

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
