"""What the kernels that walk over tokens share: their division into programs, checks, and memory for results.

Every program walks over a few tokens of one sample. Shape letters: B batch, N tokens, D model width, G groups of
tokens (one program each) of a sample.
"""

# mypy: allow-untyped-defs
# The arguments of kernels have no Python type.

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_TOKENS = 4
BACKWARD_TOKENS = 16
"""Tokens of a program. Backward's partial sums take 2 / 16 of the bytes of one fp32 activation; not yet tuned."""
MAX_ROW = 16384
"""Values of a row, padded to a power of two: twice as many spill 4.6 KB a thread (Triton 3.9 for sm_90)."""
MAX_TOKENS = 65535 * FORWARD_TOKENS
"""Of a sample: groups of tokens are the second dimension of a CUDA grid."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def own_part(tokens, dim, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """The program's sample and group, a row's columns and which of them exist, the first token and their end."""
    sample = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    first, end = group * TOKENS, tl.minimum((group + 1) * TOKENS, tokens)
    return sample, group, columns, columns < dim, first, end


@triton.jit
def load_fp32(pointer, offsets, inside):
    """The values at ``offsets`` from the pointer in fp32, zero where not ``inside``."""
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def round_norm(x, weight, rstd, rounded: tl.constexpr, CAST_FIRST: tl.constexpr):
    """The norm, rounded to the type ``rounded`` as the twin does; all other arguments and the result are fp32."""
    if CAST_FIRST:
        # A product of two bf16 numbers is exact in fp32.
        product = weight.to(rounded).to(tl.float32) * (x * rstd).to(rounded).to(tl.float32)
    else:
        product = weight * (x * rstd)
    return product.to(rounded).to(tl.float32)


def rows(x: Tensor) -> Tensor:
    """``x`` itself where its last dimension is dense, otherwise a copy: kernels take any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check_dtypes(**tensors: Tensor | None) -> None:
    """Raise ``ValueError`` for a tensor that the kernels would not compute in its own precision."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; the Triton kernels take {DTYPES}")


def check_rows(x_BND: Tensor, per_sample: dict[str, Tensor | None]) -> None:
    """Raise ``ValueError`` unless x is (B, N, D) and the others (B, 1, D), as kernels take them."""
    if x_BND.ndim != 3:
        raise ValueError(f"x must be (B, N, D), not {tuple(x_BND.shape)}")
    expected = (x_BND.shape[0], 1, x_BND.shape[2])
    for name, tensor in per_sample.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name} must be {expected} for x {tuple(x_BND.shape)}, not {tuple(tensor.shape)}")
    _, tokens, dim = x_BND.shape
    if dim > MAX_ROW or tokens > MAX_TOKENS:
        raise ValueError(
            f"the Triton kernels take up to {MAX_TOKENS} tokens of width {MAX_ROW}, not {tokens} of {dim}; "
            "use kernels=torch"
        )
    check_dtypes(x=x_BND, **per_sample)


def tile(tokens: int, dim: int) -> dict[str, int]:
    """Sizes of a program, and warps for about eight values per thread, so that bf16 is read 16 bytes at a time."""
    block = triton.next_power_of_2(dim)
    return {"TOKENS": tokens, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def empty_tokens(x: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Dense memory for (B, N, ...), by default of the shape and type of x; sequence-first where x is."""
    batch, tokens, *rest = x.shape if shape is None else shape
    if x.stride(1) > x.stride(0):
        return x.new_empty((tokens, batch, *rest), dtype=dtype).transpose(0, 1)
    return x.new_empty((batch, tokens, *rest), dtype=dtype)


def partial_sums(x_BND: Tensor, *parts: int) -> Tensor:
    """Memory for the fp32 sums (B, G, ``parts``, D) of a backward kernel's programs."""
    batch, tokens, dim = x_BND.shape
    groups = (tokens + BACKWARD_TOKENS - 1) // BACKWARD_TOKENS
    return x_BND.new_empty((batch, groups, *parts, dim), dtype=torch.float32)


def promoted(*tensors: Tensor | None) -> torch.dtype:
    """The type that an operation of torch on all of these would have."""
    return functools.reduce(torch.promote_types, [t.dtype for t in tensors if t is not None])
