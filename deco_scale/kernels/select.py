"""Selects the implementation of the kernels: fused Triton, or plain torch."""

import importlib.util
from typing import Literal

import torch
from torch import nn

KernelSetting = Literal["auto", "triton", "torch"]
Kernels = Literal["triton", "torch"]


def choose_kernels(setting: KernelSetting, device: torch.device) -> Kernels:
    """``auto`` is Triton on a GPU and torch elsewhere.

    Raises ``ValueError`` with what is missing if ``triton`` cannot run.
    """
    if setting == "torch":
        return "torch"
    missing = []
    if device.type != "cuda":
        missing.append(f"a GPU (this process computes on {device.type})")
    if importlib.util.find_spec("triton") is None:
        missing.append("the package triton, which CUDA builds of PyTorch bring along")
    if not missing:
        return "triton"
    if setting == "triton":
        raise ValueError(f"kernels=triton needs {' and '.join(missing)}; use auto or torch")
    return "torch"


def use_kernels(module: nn.Module, kernels: Kernels) -> None:
    """Set the attribute ``kernels`` of every submodule that has one."""
    for child in module.modules():
        if hasattr(child, "kernels"):
            child.kernels = kernels  # type: ignore[assignment]
