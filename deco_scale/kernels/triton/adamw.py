"""AdamW and EMA of any number of tensors of any sizes in one Triton launch.

The tensors are hundreds of separate allocations, so the kernel gets a table of addresses, and each program
updates one chunk of one tensor. The addresses are copied to the device each step, because gradients move (8 bytes
each, from page-locked memory); small torch operations compute four scalars. Not yet run on a GPU: chunk size and
number of warps are not tuned.
"""
# mypy: allow-untyped-defs
# The arguments of kernels have no Python type.

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from deco_scale.kernels.adamw import AdamWStep, AdamWTensors

CHUNK = 4096
"""Elements of a program: 80 KiB read and 64 KiB written."""
NUM_WARPS = 8
_FIELDS = tl.constexpr(5)
_ALIGNMENT = tl.constexpr(16)
"""Bytes of the widest load of a thread."""


@triton.jit
def _elements(address, offsets, WHOLE: tl.constexpr):
    """Pointers to fp32 elements; where ``WHOLE``, the compiler knows that the address is aligned."""
    pointer = address.to(tl.pointer_type(tl.float32))
    if WHOLE:
        pointer = tl.multiple_of(pointer, _ALIGNMENT)
    return pointer + offsets


@triton.jit
def _update(addresses, offsets, size, numbers, WHOLE: tl.constexpr):
    """The formula on the elements ``offsets`` of the five tensors at ``addresses``; address 0 means no EMA.

    ``rest`` is one minus the respective beta or decay. Where ``WHOLE``, tensors are aligned and hold all of the
    offsets: loads and stores are 16 bytes wide.
    """
    factor, step_size, correction_sqrt, decay, beta1, rest1, beta2, rest2, eps, ema_rest = numbers
    parameter_at = _elements(addresses[0], offsets, WHOLE)
    exp_avg_at = _elements(addresses[2], offsets, WHOLE)
    exp_avg_sq_at = _elements(addresses[3], offsets, WHOLE)
    average_at = _elements(addresses[4], offsets, WHOLE)
    mask, averaged = None if WHOLE else offsets < size, addresses[4] != 0
    grad = tl.load(_elements(addresses[1], offsets, WHOLE), mask=mask) * factor
    parameter = tl.load(parameter_at, mask=mask)
    parameter -= decay * parameter
    exp_avg = beta1 * tl.load(exp_avg_at, mask=mask) + rest1 * grad
    exp_avg_sq = beta2 * tl.load(exp_avg_sq_at, mask=mask) + rest2 * grad * grad
    # Rounded as IEEE 754 says: the plain operators may be approximations on a GPU.
    denominator = tl.div_rn(tl.sqrt_rn(exp_avg_sq), correction_sqrt) + eps
    parameter -= tl.div_rn(step_size * exp_avg, denominator)
    tl.store(parameter_at, parameter, mask=mask)
    tl.store(exp_avg_at, exp_avg, mask=mask)
    tl.store(exp_avg_sq_at, exp_avg_sq, mask=mask)
    if averaged:
        average = tl.load(average_at, mask=mask)
        tl.store(average_at, average + ema_rest * (parameter - average), mask=mask)


@triton.jit
def _averaged_adamw(
    addresses, sizes, chunk_tensors, chunk_numbers, scalars,
    decay, beta1, rest1, beta2, rest2, eps, ema_rest, CHUNK_SIZE: tl.constexpr,
):  # fmt: skip
    """Chunk ``program_id``: ``addresses`` (tensors, 5) int64, ``sizes`` (tensors,) int64, chunk tables int32.

    ``scalars`` are fp32: gradient factor, skipped, step size, root of the second moment's bias correction.
    """
    if tl.load(scalars + 1) == 0.0:
        program = tl.program_id(0)
        tensor = tl.load(chunk_tensors + program)
        start = tl.load(chunk_numbers + program).to(tl.int64) * CHUNK_SIZE
        size = tl.load(sizes + tensor)
        row = addresses + tensor * _FIELDS
        parameter, grad, exp_avg = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        exp_avg_sq, average = tl.load(row + 3), tl.load(row + 4)
        factor, step_size, correction_sqrt = tl.load(scalars), tl.load(scalars + 2), tl.load(scalars + 3)
        numbers = (factor, step_size, correction_sqrt, decay, beta1, rest1, beta2, rest2, eps, ema_rest)
        offsets = start + tl.arange(0, CHUNK_SIZE)
        bits = parameter | grad | exp_avg | exp_avg_sq | average
        if (bits % _ALIGNMENT == 0) & (start + CHUNK_SIZE <= size):
            _update((parameter, grad, exp_avg, exp_avg_sq, average), offsets, size, numbers, True)
        else:
            _update((parameter, grad, exp_avg, exp_avg_sq, average), offsets, size, numbers, False)


@lru_cache(maxsize=64)
def _chunks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``sizes`` (tensors,) on the device, and of each chunk its tensor and its number within it."""
    sizes_host = torch.tensor(sizes)
    counts = (sizes_host + CHUNK - 1) // CHUNK
    tensors = torch.repeat_interleave(torch.arange(len(sizes)), counts)
    numbers = torch.arange(len(tensors)) - (counts.cumsum(0) - counts)[tensors]
    return sizes_host.to(device), tensors.int().to(device), numbers.int().to(device)


def adamw_ema_triton(tensors: AdamWTensors, step: AdamWStep) -> None:
    """Update parameters, moments and EMAs in place; gradients do not change."""
    device = tensors.parameters[0].device
    rows = zip(tensors.parameters, tensors.grads, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.emas, strict=True)
    table = [[0 if tensor is None else tensor.data_ptr() for tensor in row] for row in rows]
    # The host does not wait for a copy from page-locked memory.
    addresses = torch.tensor(table, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    sizes, chunk_tensors, chunk_numbers = _chunks(tuple(p.numel() for p in tensors.parameters), device)
    (beta1, beta2), one = step.betas, torch.ones_like(step.count)
    # In fp32, one minus a power of a beta near one would lose digits in the first steps.
    correction1, correction2 = (1.0 - torch.pow(beta, step.count.double()) for beta in step.betas)
    factor = one if step.factor is None else step.factor
    skipped = one - one if step.skipped is None else step.skipped
    scalars = torch.stack([factor, skipped, (step.lr / correction1).float(), correction2.sqrt().float()])
    _averaged_adamw[(len(chunk_tensors),)](
        addresses, sizes, chunk_tensors, chunk_numbers, scalars,
        step.lr * step.weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, step.eps, 1.0 - step.ema_decay,
        CHUNK_SIZE=CHUNK, num_warps=NUM_WARPS,
    )  # fmt: skip
