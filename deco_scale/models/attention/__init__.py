"""Attention: :func:`attention` over the kernels of several packages, and the measurement that ranks them."""

from deco_scale.models.attention.dispatch import (
    FLASH_KERNELS,
    KERNELS,
    AttentionKernel,
    AttentionSetting,
    AttentionTable,
    KernelFunction,
    attention,
    check_backend,
    kernel_missing,
)

__all__ = [
    "FLASH_KERNELS",
    "KERNELS",
    "AttentionKernel",
    "AttentionSetting",
    "AttentionTable",
    "KernelFunction",
    "attention",
    "check_backend",
    "kernel_missing",
]
