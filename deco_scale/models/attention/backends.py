"""Attention of optional packages: FlashAttention 4, 3 and 2, and Transformer Engine, imported when first used.

All take and return ``(B, N, H, K)``, queries and keys in the values' dtype, without mask and with the scale
``K ** -0.5``. Not yet run on a GPU. Under ``torch.compile`` FlashAttention 2 and 3 are traced where the installed
version registers operators, and are a graph break where it does not; FlashAttention 4 and Transformer Engine are
always a graph break. Shape letters: B batch, N queries, M keys, H heads, K head width.
"""

import functools
import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deco_scale.models.compile import constant_in_graphs, outside_graphs

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


def graph_break(name: str) -> str | None:
    """Why a compiled block breaks at this kernel, or None if it can be part of a graph; imports the package."""
    package = PACKAGES.get(name)
    if package is None or (package.namespace and _traceable(name)):
        return None
    return f"{package.title} registers no operator here, and a compiled block would break at it"


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
