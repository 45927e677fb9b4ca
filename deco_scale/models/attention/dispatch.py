"""The attention function, which dispatches to one of several kernels.

A configuration names a ``backend``, which selects a ``kernel``. ``flash`` is the newest FlashAttention that is
installed and fits; ``auto`` is PyTorch's choice, or a table of measured kernels (autotune.py). A backend that is
named and cannot run is an error.

FlashAttention 4, 3 and 2 and Transformer Engine are optional packages, imported when a kernel is first used. All
kernels take and return ``(B, N, H, K)``, queries and keys in the values' dtype, without mask and with the scale
``K ** -0.5``. Not yet run on a GPU. Under ``torch.compile`` FlashAttention 2 and 3 are traced where the installed
version registers operators, and are a graph break where it does not; FlashAttention 4 and Transformer Engine are
always a graph break.
Shape letters: B batch, N queries, M keys, H heads, K head width.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from deco_scale.models.compile import constant_in_graphs, outside_graphs
from deco_scale.models.config import AttentionBackend

AttentionKernel = Literal["flash4", "flash3", "flash2", "flash_torch", "te", "cudnn", "sdpa", "math"]
KernelFunction = Callable[[Tensor, Tensor, Tensor], Tensor]
FLASH_KERNELS: tuple[AttentionKernel, ...] = ("flash4", "flash3", "flash2", "flash_torch")
_TORCH_NEEDS = "a CUDA build of PyTorch and a GPU of compute capability 8.0 or more"
HALF_PRECISION = (torch.float16, torch.bfloat16)
_EIGHTS = range(8, 257, 8)
_BLACKWELL_WIDTHS = (*range(8, 129, 8), 256)


@dataclass(frozen=True)
class Package:
    """A package: ``widths`` are the head widths it takes, by major compute capability.

    ``namespace``: where it registers the operator ``_flash_attn_forward``, in versions that do.
    """

    title: str
    module: str
    function: str
    install: str
    widths: Mapping[int, Collection[int]]
    namespace: str = ""

    @property
    def needs(self) -> str:
        """What the kernel requires: package, how to install it, GPU."""
        majors = ", ".join(f"{major}.x" for major in self.widths)
        return f"{self.title} ({self.install}) and a GPU of compute capability {majors}"


# Sources: flash_attn/cute/interface.py (_validate_head_dims), README.md of Dao-AILab/flash-attention, torch's
# nn/attention/_fa3.py, Transformer Engine's DotProductAttention. FlashAttention 2 pads odd widths itself.
PACKAGES: dict[str, Package] = {
    "flash4": Package(
        "FlashAttention 4", "flash_attn.cute", "flash_attn_func", "pip install flash-attn-4",
        {9: _EIGHTS, 10: _BLACKWELL_WIDTHS, 11: _BLACKWELL_WIDTHS},
    ),
    "flash3": Package(
        "FlashAttention 3", "flash_attn_interface", "flash_attn_func",
        "built from the folder hopper of github.com/Dao-AILab/flash-attention", {9: _EIGHTS}, "flash_attn_3",
    ),
    "flash2": Package(
        "FlashAttention 2", "flash_attn", "flash_attn_func",
        "pip install --no-build-isolation 'flash-attn>=2.7,<3'",
        dict.fromkeys((8, 9, 10, 11, 12), range(1, 257)), "flash_attn",
    ),
    "te": Package(
        "Transformer Engine 2", "transformer_engine.pytorch", "DotProductAttention",
        "pip install --no-build-isolation 'transformer-engine[pytorch]>=2'",
        dict.fromkeys((8, 9, 10, 11, 12), _EIGHTS),
    ),
}  # fmt: skip


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
        name = _flash_kernel(v_BMHK.device, v_BMHK.dtype, v_BMHK.shape[-1])
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


def package_missing(name: str, capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str | None:
    """Why a package cannot compute on a GPU of this capability, or None; imports it if everything else fits."""
    package = PACKAGES[name]
    if dtype not in HALF_PRECISION:
        return f"{package.title} takes float16 and bfloat16, not {dtype}"
    widths = package.widths.get(capability[0])
    if widths is None:
        return f"needs {package.needs} (this one has {capability[0]}.{capability[1]})"
    if head_dim not in widths:
        return f"{package.title} does not take heads of width {head_dim} on compute capability {capability[0]}.x"
    error = _import_error(package.module, package.function)
    return f"needs {package.needs} ({error})" if error else None


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


@constant_in_graphs
def _flash_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    return _newest_flash(device, dtype, head_dim)


@functools.cache
def _newest_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The first of ``FLASH_KERNELS`` that can run; raises ``ValueError`` if none can."""
    for kernel in FLASH_KERNELS:
        if kernel_missing(kernel, device, dtype, head_dim) is None:
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


@outside_graphs
def flash4(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """FlashAttention 4; always a graph break, since its kernels are not registered as operators."""
    from flash_attn.cute import flash_attn_func

    return _output(flash_attn_func(q_BNHK.to(v_BMHK.dtype), k_BMHK.to(v_BMHK.dtype), v_BMHK))


def flash3(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """FlashAttention 3."""
    return (_flash3 if _traceable("flash3") else _flash3_untraced)(q_BNHK, k_BMHK, v_BMHK)


def flash2(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """FlashAttention 2."""
    return (_flash2 if _traceable("flash2") else _flash2_untraced)(q_BNHK, k_BMHK, v_BMHK)


@outside_graphs
def transformer_engine(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    """Transformer Engine, which selects cuDNN's or FlashAttention's kernel itself; always a graph break."""
    num_heads, head_dim = q_BNHK.shape[-2:]
    core = _core_attention(num_heads, head_dim, q_BNHK.shape[1] != k_BMHK.shape[1])
    out: Tensor = core(q_BNHK.to(v_BMHK.dtype), k_BMHK.to(v_BMHK.dtype), v_BMHK)
    return out.unflatten(-1, (num_heads, head_dim)) if out.dim() == 3 else out


def _flash3(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    from flash_attn_interface import flash_attn_func

    return _output(flash_attn_func(q_BNHK.to(v_BMHK.dtype), k_BMHK.to(v_BMHK.dtype), v_BMHK))


def _flash2(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    return _output(flash_attn_func(q_BNHK.to(v_BMHK.dtype), k_BMHK.to(v_BMHK.dtype), v_BMHK))


_flash3_untraced, _flash2_untraced = outside_graphs(_flash3), outside_graphs(_flash2)


@functools.cache
def _core_attention(num_heads: int, head_dim: int, cross: bool) -> Any:
    """Transformer Engine's module for this shape, which has no parameters."""
    from transformer_engine.pytorch import DotProductAttention

    kind = "cross" if cross else "self"
    return DotProductAttention(
        num_heads, head_dim, qkv_format="bshd", attn_mask_type="no_mask", attention_type=kind
    )


def _output(result: Any) -> Tensor:
    """The attention output; some versions return it with the log-sum-exp of the softmax."""
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


@constant_in_graphs
def _traceable(name: str) -> bool:
    """Whether the package's operator is registered with PyTorch; imports the package."""
    package = PACKAGES[name]
    return _import_error(package.module, package.function) is None and hasattr(
        getattr(torch.ops, package.namespace), "_flash_attn_forward"
    )


@functools.cache
def _import_error(module: str, function: str) -> str | None:
    """Why ``function`` of ``module`` cannot be imported, or None."""
    try:
        getattr(importlib.import_module(module), function)
    except (ImportError, RuntimeError, OSError, AttributeError, AssertionError) as error:
        # Transformer Engine without its PyTorch part raises RuntimeError, without its libraries OSError.
        return f"importing {module} failed ({type(error).__name__}: {error})"
    return None


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
