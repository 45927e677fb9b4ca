"""One attention function in front of the kernels that can compute it.

``auto`` lets PyTorch choose; a backend asked for by name and not usable here is an error.
Shape letters: B batch, N queries, M keys, H heads, K head width.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionBackend = Literal["auto", "sdpa", "flash", "cudnn", "math"]

_FORCED = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def _sdpa(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    out_BHNK = F.scaled_dot_product_attention(
        q_BNHK.transpose(1, 2), k_BMHK.transpose(1, 2), v_BMHK.transpose(1, 2)
    )
    return out_BHNK.transpose(1, 2)


def _math(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor) -> Tensor:
    scores_BHNM = torch.einsum("bnhk,bmhk->bhnm", q_BNHK.float(), k_BMHK.float())
    weights_BHNM = (scores_BHNM * q_BNHK.shape[-1] ** -0.5).softmax(dim=-1)
    return torch.einsum("bhnm,bmhk->bnhk", weights_BHNM, v_BMHK.float()).to(v_BMHK.dtype)


def attention(q_BNHK: Tensor, k_BMHK: Tensor, v_BMHK: Tensor, backend: AttentionBackend) -> Tensor:
    """Softmax attention without mask; returns ``(B, N, H, K)`` in the values' dtype."""
    if backend == "math":
        return _math(q_BNHK, k_BMHK, v_BMHK)
    if backend in _FORCED:
        with sdpa_kernel(_FORCED[backend]):
            return _sdpa(q_BNHK, k_BMHK, v_BMHK)
    return _sdpa(q_BNHK, k_BMHK, v_BMHK)


def check_backend(backend: AttentionBackend, device: torch.device) -> None:
    """Raise ``ValueError`` when ``backend`` cannot run on ``device``; says which ones can."""
    needs_cuda: dict[str, Callable[[], bool]] = {
        "flash": torch.backends.cuda.flash_sdp_enabled,
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled,
    }
    if backend not in get_args(AttentionBackend):
        raise ValueError(f"attention backend {backend!r} is none of {get_args(AttentionBackend)}")
    if backend in needs_cuda and not (device.type == "cuda" and needs_cuda[backend]()):
        raise ValueError(
            f"attention.backend={backend} needs a CUDA build of PyTorch and a GPU, and this process "
            f"computes on {device.type}; use auto, sdpa or math"
        )
