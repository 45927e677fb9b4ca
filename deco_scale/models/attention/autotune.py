"""Measures forward and backward of the attention kernels at the start of a run, and selects the fastest per shape.

Each candidate is first compared with the formula in float64; one that differs or raises is rejected with the
reason. Times exclude the host's time to launch kernels. Not yet run on a GPU. On a CPU nothing is measured and
``auto`` is ``sdpa``, so that traces do not depend on timing.

Shape letters: B batch, N queries, M keys, H heads, K head width.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from deco_scale.models.attention.backends import graph_break
from deco_scale.models.attention.dispatch import (
    KERNELS,
    AttentionTable,
    KernelFunction,
    is_hopper,
    kernel_missing,
)
from deco_scale.models.config import ModelConfig

RACED = ("flash4", "flash3", "flash2", "flash_torch", "te", "cudnn", "sdpa")
"""Kernels that ``auto`` measures on a GPU; ``math`` is the reference and needs too much memory."""
HOPPER_PREFERRED = ("cudnn", "flash3", "flash4")
TIE = 1.03
"""On a GPU of compute capability 9.x one of these is chosen where another is faster by less than this: times
of single runs differ by as much."""

_BUSY_CYCLES = 4_000_000


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention call on one rank."""

    batch: int
    queries: int
    keys: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True)
class BackendChoice:
    """The kernel for a shape, in plain values that rank 0 can broadcast.

    ``times_ms``: kernel and median milliseconds of forward and backward, fastest first; empty if nothing was
    measured. ``left_out``: rejected kernels and reasons.
    """

    shape: AttentionShape
    kernel: str
    times_ms: tuple[tuple[str, float], ...] = ()
    left_out: tuple[tuple[str, str], ...] = ()

    def line(self) -> str:
        """One line for the log."""
        size = f"{self.shape.queries} queries, {self.shape.keys} keys"
        if not self.times_ms:
            return f"attention for {size}: {self.kernel}, not measured on this device"
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in self.times_ms)
        out = "".join(f"; without {name}: {reason}" for name, reason in self.left_out)
        return f"attention for {size}: {self.kernel} of {times}{out}"


def model_shapes(cfg: ModelConfig, *, resolution: int, batch: int, tp: int = 1) -> tuple[AttentionShape, ...]:
    """Attention shapes of image blocks and text blocks on one rank, for square images.

    Raises ``ValueError`` if ``resolution`` is not a multiple of the patch size.
    """
    rows, cols = cfg.grid(resolution, resolution)
    patches, heads = rows * cols, cfg.num_heads // tp
    shapes = [AttentionShape(batch, patches, patches + cfg.text_tokens, heads, cfg.head_dim)]
    if cfg.num_text_blocks:
        shapes.append(AttentionShape(batch, cfg.text_tokens, cfg.text_tokens, heads, cfg.head_dim))
    return tuple(shapes)


def choose_backend(
    shape: AttentionShape,
    *,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Mapping[str, KernelFunction] | None = None,
    compiled: bool = False,
) -> BackendChoice:
    """The fastest candidate on this process's device (see :func:`preferred`); all ranks must use one's result.

    ``compiled``: blocks are compiled, and kernels that would break their graphs are left out.
    ``candidates`` None: on a GPU all of ``RACED`` that can run, elsewhere ``sdpa`` without measurement. Raises
    ``ValueError`` with the reasons if every candidate is rejected.
    """
    left_out: dict[str, str] = {}
    if candidates is None:
        if device.type != "cuda":
            return BackendChoice(shape, "sdpa")
        missing = {name: kernel_missing(name, device, dtype, shape.head_dim) for name in RACED}  # type: ignore[arg-type]
        if compiled:
            missing = {name: reason or graph_break(name) for name, reason in missing.items()}
        left_out = {name: reason for name, reason in missing.items() if reason is not None}
        candidates = {name: KERNELS[name] for name in RACED if name not in left_out}
    # One sample is enough to compare, and float64 weights of a full batch would be large.
    sample = _inputs(shape, 1, device, dtype)
    reference = _results(KERNELS["math"], [x.double() for x in sample])
    inputs = _inputs(shape, shape.batch, device, dtype)
    times: dict[str, float] = {}
    for name, kernel in candidates.items():
        try:
            error = _error(_results(kernel, sample), reference)
            if not error <= error_bound(dtype):
                left_out[name] = f"differs from the formula by {error:.1e} of the largest value"
                continue
            times[name] = median_ms(functools.partial(_results, kernel, inputs), device)
        except Exception as error:
            # A package may raise anything; the run continues with the others, and the reason is logged.
            left_out[name] = f"{type(error).__name__}: {_first_line(error)}"
    if not times:
        raise ValueError(f"no attention kernel computes {shape} in {dtype} on {device}: {left_out}")
    ranked = tuple(sorted(times.items(), key=lambda item: item[1]))
    return BackendChoice(shape, preferred(times, hopper=is_hopper(device)), ranked, tuple(left_out.items()))


def preferred(times_ms: Mapping[str, float], *, hopper: bool) -> str:
    """The fastest kernel; on Hopper the fastest of :data:`HOPPER_PREFERRED` if it is within :data:`TIE` of it."""
    ranked = sorted(times_ms, key=lambda name: times_ms[name])
    for name in ranked if hopper else ():
        if name in HOPPER_PREFERRED and times_ms[name] <= TIE * times_ms[ranked[0]]:
            return name
    return ranked[0]


def table_of(choices: Iterable[BackendChoice]) -> AttentionTable:
    """The table for the model's attention; other shapes use the kernel of the largest shape.

    The last of several choices for the same queries and keys counts.
    """
    ordered = sorted(choices, key=lambda choice: choice.shape.queries * choice.shape.keys)
    by_shape = {(c.shape.queries, c.shape.keys): c.kernel for c in ordered}
    entries = tuple((queries, keys, kernel) for (queries, keys), kernel in by_shape.items())
    return AttentionTable(ordered[-1].kernel, entries)  # type: ignore[arg-type]


def error_bound(dtype: torch.dtype) -> float:
    """Largest allowed difference from float64, relative to the largest entry; see :func:`_error`.

    16 bit: results are rounded once and the weights before their product with the values, which measured at most
    1.8 eps on a CPU (128 to 1,152 keys, width 64). float32: sums over keys, at most 16 eps there; products of
    TF32 where PyTorch is allowed them.
    """
    if dtype in (torch.float16, torch.bfloat16):
        return 4 * torch.finfo(dtype).eps
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 4 * 2.0**-10
    return 64 * torch.finfo(dtype).eps


def keep_busy(device: torch.device) -> None:
    """Keep a GPU busy for about 2 ms, while the host launches what follows; nothing on other devices.

    The time between two CUDA events on an idle GPU is the host's launch time where that is longer, which would
    hide the differences between kernels for small shapes.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda._sleep(_BUSY_CYCLES)


def median_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median of 10 runs in milliseconds, by CUDA events behind :func:`keep_busy`, or by the clock on a CPU."""
    for _ in range(3):
        run()
    times = []
    for _ in range(10):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            keep_busy(device)
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start_s = time.perf_counter()
            run()
            times.append(1000 * (time.perf_counter() - start_s))
    return statistics.median(times)


def _inputs(shape: AttentionShape, batch: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Random queries, keys, values and gradient of the output, always the same."""
    generator = torch.Generator(device).manual_seed(0)
    lengths = (shape.queries, shape.keys, shape.keys, shape.queries)
    sizes = [(batch, length, shape.num_heads, shape.head_dim) for length in lengths]
    return [torch.randn(size, generator=generator, device=device).to(dtype) for size in sizes]


def _results(kernel: KernelFunction, inputs: list[Tensor]) -> list[Tensor]:
    """Output, and gradients of queries, keys and values."""
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out_BNHK = kernel(*leaves)
    return [out_BNHK.detach(), *torch.autograd.grad(out_BNHK, leaves, inputs[3])]


def _error(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, relative to the largest entry of the same result or of the output.

    With a single key, the gradients of queries and keys are zero and only the output sets a scale.
    """
    errors = []
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"shape {tuple(one.shape)} instead of {tuple(other.shape)}")
        size = torch.maximum(other.abs().max(), expected[0].abs().max())
        errors.append((one.double() - other).abs().max() / size)
    return torch.stack(errors).max().item()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
