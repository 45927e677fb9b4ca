"""SwiGLU's activation on gate and up as one linear gives them: all gates, then all ups.

Plain torch here, Triton kernels (one forward, one backward, which save only the input) in
:mod:`deco_scale.kernels.triton.swiglu`. In fp32 the two agree to rounding; in bf16 torch rounds ``silu(gate)``
and each factor of a gradient, the kernels compute in fp32 and round each result once.
Formula: Shazeer, arXiv 2002.05202.
"""

import torch.nn.functional as F
from torch import Tensor

from deco_scale.kernels.select import Kernels


def swiglu(gate_up: Tensor, *, kernels: Kernels) -> Tensor:
    """``silu(gate) * up`` (..., H) of ``gate_up`` (..., 2H): gate is the first half of the last dimension.

    Raises ``ValueError`` for an odd last dimension, and with ``kernels="triton"`` for types other than fp32, bf16
    and fp16.
    """
    if gate_up.shape[-1] % 2:
        raise ValueError(f"gate and up are halves, the last dimension of {tuple(gate_up.shape)} is odd")
    if kernels == "triton":
        from deco_scale.kernels.triton.swiglu import swiglu as fused

        return fused(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
