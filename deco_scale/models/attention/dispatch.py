"""The attention function, which dispatches to one of several kernels.

A configuration names a ``backend``, which selects a ``kernel``. ``flash`` is the newest FlashAttention that is
installed and fits (on Hopper cuDNN's before FlashAttention 2), in a compiled block the newest that does not break
its graph; ``auto`` is PyTorch's choice, or a table of measured kernels (autotune.py). A backend that is
named and cannot run is an error.
Shape letters: B batch, N queries, M keys, H heads, K head width.
"""

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from deco_scale.models.attention.backends import (
    HALF_PRECISION,
    PACKAGES,
    flash2,
    flash3,
    flash4,
    graph_break,
    package_missing,
    transformer_engine,
)
from deco_scale.models.compile import constant_in_graphs
from deco_scale.models.config import AttentionBackend

AttentionKernel = Literal["flash4", "flash3", "flash2", "flash_torch", "te", "cudnn", "sdpa", "math"]
KernelFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
FLASH_KERNELS: tuple[AttentionKernel, ...] = ("flash4", "flash3", "flash2", "flash_torch")
HOPPER_KERNELS: tuple[AttentionKernel, ...] = ("flash4", "flash3", "cudnn", "flash2", "flash_torch")
"""Kernels of ``flash``, the preferred first; for compute capability 9.x, where FlashAttention 2 has no use of the
asynchronous tensor cores (Shah et al., arXiv 2407.08608) and cuDNN has. Not yet run on a GPU."""
_TORCH_NEEDS = "a CUDA build of PyTorch and a GPU of compute capability 8.0 or more"


@dataclass(frozen=True)
class AttentionTable:
    """Kernels by number of queries and keys, ``((N, M, kernel), ...)``; ``default`` for all other shapes.

    ``torch.compile`` looks kernels up while tracing, so that a graph holds one kernel.
    """

    default: AttentionKernel
    by_shape: tuple[tuple[int, int, AttentionKernel], ...] = ()

    def kernel(self, queries: int, keys: int) -> AttentionKernel:
        for num_queries, num_keys, name in self.by_shape:
            if num_queries == queries and num_keys == keys:
                return name
        return self.default


AttentionSetting = AttentionBackend | AttentionKernel | AttentionTable


def attention(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, backend: AttentionSetting) -> Tensor:
    """Softmax attention without mask, scaled by ``K ** -0.5``; returns ``(B, N, H, K)`` in the values' dtype.

    Raises ``ValueError`` for an unknown name, and for ``flash`` if no FlashAttention can run.
    """
    if isinstance(backend, AttentionTable):
        name: str = backend.kernel(q_BNHK.shape[1], k_BMHK.shape[1])
    elif backend == "auto":
        name = "sdpa"
    elif backend == "flash":
        compiled = torch.compiler.is_compiling()
        name = _flash_kernel(v_BMHK.device, v_BMHK.dtype, v_BMHK.shape[-1], compiled)
    else:
        name = backend
    if name not in KERNELS:
        raise ValueError(f"attention backend {name!r} is none of {get_args(AttentionBackend)}")
    return KERNELS[name](q_BNHK, k_BMHK, v_BMHK)


def check_backend(backend: AttentionBackend, device: torch.device, *, dtype: torch.dtype, head_dim: int) -> None:
    """Raise ``ValueError`` if ``backend`` cannot run on ``device``, with reason, remedy and alternatives."""
    reasons = _backend_missing(backend, device, dtype, head_dim)
    if reasons:
        usable = [b for b in get_args(AttentionBackend) if not _backend_missing(b, device, dtype, head_dim)]
        raise ValueError(
            f"attention.backend={backend} cannot run here: {'; '.join(reasons)}. "
            f"Use {', '.join(usable[:-1])} or {usable[-1]}"
        )


def kernel_missing(kernel: AttentionKernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why ``kernel`` cannot run on ``device`` in ``dtype`` with heads of this width, or None if it can."""
    if kernel in ("sdpa", "math"):
        return None
    needs = PACKAGES[kernel].needs if kernel in PACKAGES else _TORCH_NEEDS
    if device.type != "cuda":
        return f"needs {needs} (this process computes on {device.type})"
    if torch.version.cuda is None:
        return f"needs {needs} (this PyTorch {torch.__version__} is not built for CUDA)"
    capability = torch.cuda.get_device_capability(device)
    if kernel in PACKAGES:
        return package_missing(kernel, capability, dtype, head_dim)
    if dtype not in HALF_PRECISION:
        return f"PyTorch's {kernel} kernel takes float16 and bfloat16, not {dtype}"
    return _torch_refusal(kernel, device, dtype, head_dim)


def _backend_missing(
    backend: AttentionBackend, device: torch.device, dtype: torch.dtype, head_dim: int
) -> list[str]:
    """Reasons why no kernel of the backend can run; empty if one can."""
    if backend == "auto":
        return []
    kernels = FLASH_KERNELS if backend == "flash" else (backend,)
    reasons = []
    for kernel in kernels:
        reason = kernel_missing(kernel, device, dtype, head_dim)
        if reason is None:
            return []
        reasons.append(f"{kernel} {reason}")
    return reasons


def is_hopper(device: torch.device) -> bool:
    """Whether the device is a GPU of compute capability 9.x."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


@constant_in_graphs
def _flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool) -> str:
    return _newest_flash(device, dtype, head_dim, compiled)


@functools.cache
def _newest_flash(device: torch.device, dtype: torch.dtype, head_dim: int, compiled: bool) -> str:
    """The first kernel of ``flash`` that can run, if ``compiled`` in a graph; ``ValueError`` if none can."""
    for kernel in HOPPER_KERNELS if is_hopper(device) else FLASH_KERNELS:
        if kernel_missing(kernel, device, dtype, head_dim) is None and not (compiled and graph_break(kernel)):
            return kernel
    check_backend("flash", device, dtype=dtype, head_dim=head_dim)
    raise AssertionError("check_backend found a flash kernel that can run")


def _torch_refusal(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """PyTorch's reason against its kernel for a small example; not yet run on a GPU."""
    can_use = can_use_flash_attention if kernel == "flash_torch" else can_use_cudnn_attention
    example = torch.zeros(1, 1, 128, head_dim, device=device, dtype=dtype, requires_grad=True)
    params = SDPAParams(example, example, example, None, 0.0, False, False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if can_use(params, True):
            return None
    why = " ".join(str(one.message) for one in caught) or "PyTorch gives no reason"
    return f"needs {_TORCH_NEEDS} (refused for heads of width {head_dim} in {dtype}: {why})"


def _sdpa(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    out_BHNK = F.scaled_dot_product_attention(
        q_BNHK.transpose(1, 2), k_BMHK.transpose(1, 2), v_BMHK.transpose(1, 2)
    )
    return out_BHNK.transpose(1, 2)


def _flash_torch(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return _sdpa(q_BNHK, k_BMHK, v_BMHK)


def _cudnn(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q_BNHK, k_BMHK, v_BMHK)


def _math(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """The formula in fp32 or better, also under autocast; materialises the (N, M) weights of every head."""
    wide = torch.promote_types(v_BMHK.dtype, torch.float32)
    with torch.autocast(v_BMHK.device.type, enabled=False):
        scores_BHNM = torch.einsum("bnhk,bmhk->bhnm", q_BNHK.to(wide), k_BMHK.to(wide))
        weights_BHNM = (scores_BHNM * q_BNHK.shape[-1] ** -0.5).softmax(dim=-1)
        return torch.einsum("bhnm,bmhk->bnhk", weights_BHNM, v_BMHK.to(wide)).to(v_BMHK.dtype)


KERNELS: dict[str, KernelFunction] = {
    "flash4": flash4,
    "flash3": flash3,
    "flash2": flash2,
    "flash_torch": _flash_torch,
    "te": transformer_engine,
    "cudnn": _cudnn,
    "sdpa": _sdpa,
    "math": _math,
}
