"""Bytes that a DiT block reads and writes, by operation, at the XXL's shapes: fused, and operation by operation.

``python -m benchmarks.traffic [--out DIR]`` runs forward and backward of an image block on tensors without values,
with the Triton operators, and adds up the tensors that each dispatched operation takes and returns. It needs no
GPU and takes seconds. Weights and activations are bf16, as FSDP hands them to a block. A value counts once per
operation that takes it; views count nothing; what caches spare or kernels read twice is not seen. The block
operation by operation is how ours was composed before its fusions. GEMMs and attention are listed apart.
"""

import argparse
import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import record
from deco_scale.config import load_config
from deco_scale.kernels.select import use_kernels
from deco_scale.kernels.triton.adaln import gated_residual, norm_modulate
from deco_scale.kernels.triton.operators import operator
from deco_scale.kernels.triton.token_rows import partial_sums
from deco_scale.models import ModelConfig
from deco_scale.models.attention.dispatch import attention
from deco_scale.models.layers import NORM_EPS, Block

CONFIG = record.ROOT / "configs" / "t2i_xxl.yaml"
GEMMS = ("mm", "addmm", "bmm", "baddbmm")
LEAST_SAVED = 0.35
"""Share of the bytes outside GEMMs and attention that the fusions must save."""


@dataclasses.dataclass
class Traffic:
    """Calls and bytes of an operation."""

    calls: int = 0
    read: int = 0
    written: int = 0


Counts = dict[str, dict[str, Traffic]]
"""By pass (``forward``, ``backward``) and name of the operation."""


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes of every operation within :meth:`passing`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = {}
        self._current: dict[str, Traffic] = {}

    @contextmanager
    def passing(self, name: str) -> Iterator[None]:
        """Count what runs within under the pass ``name``."""
        self._current = self.counts.setdefault(name, defaultdict(Traffic))
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        storages = {x.untyped_storage()._cdata for x in inputs}
        written = [x for x in outputs if x.untyped_storage()._cdata not in storages]
        if func._schema.is_mutable:
            written = outputs
        # Views move nothing, and memory that is only allocated is written by whoever fills it.
        if written and "empty" not in name:
            traffic = self._current[name]
            traffic.calls += 1
            traffic.read += sum(map(_bytes, inputs))
            traffic.written += sum(map(_bytes, written))
        return result


def _bytes(x: Tensor) -> int:
    """Of the values that differ: an expanded dimension is one value."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or size == 0)
    return torch.Size(sizes).numel() * x.element_size()


@operator("deco_scale_benchmark::norm_rotate")
def _norm_rotate(x: Tensor, weight: Tensor, angles: Tensor | None) -> Tensor:
    raise NotImplementedError("only counted")


@_norm_rotate.register_fake
def _(x: Tensor, weight: Tensor, angles: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


@operator("deco_scale_benchmark::norm_rotate_backward")
def _norm_rotate_backward(grad: Tensor, x: Tensor, weight: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only counted")


@_norm_rotate_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, angles: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), partial_sums(x.flatten(0, 1)[None, :, 0])[0]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x, partial = _norm_rotate_backward(grad, *ctx.saved_tensors)
    return grad_x, partial.sum(0).to(ctx.saved_tensors[1].dtype), None


_norm_rotate.register_autograd(_gradients, setup_context=_save)


class SeparateBlock(nn.Module):
    """The image block before its fusions: an operator for each step, parts put together by ``cat``."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        dim, hidden = cfg.dim, cfg.mlp_hidden_dim
        self.head_dim = cfg.head_dim
        self.qkv, self.context_kv = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.proj, self.modulation = nn.Linear(dim, dim), nn.Linear(dim, 6 * dim)
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(self.head_dim)) for _ in range(2))

    def forward(self, x_BND: Tensor, condition_B1D: Tensor, angles_NE: Tensor, context_BLD: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition_B1D).chunk(6, -1)
        hidden = norm_modulate(x_BND, self.norm1, shift1, scale1, NORM_EPS, False)
        q, k, v = self.qkv(hidden).unflatten(-1, (-1, 3, self.head_dim)).unbind(-2)
        context_k, context_v = self.context_kv(context_BLD).unflatten(-1, (-1, 2, self.head_dim)).unbind(-2)
        q, k = _norm_rotate(q, self.q_norm, angles_NE), _norm_rotate(k, self.k_norm, angles_NE)
        k = torch.cat([k, _norm_rotate(context_k, self.k_norm, None)], dim=1)
        v = torch.cat([v, context_v], dim=1)
        attended = self.proj(attention(q, k, v, "auto").flatten(-2))
        x_BND = gated_residual(x_BND, gate1, attended)
        hidden = norm_modulate(x_BND, self.norm2, shift2, scale2, NORM_EPS, False)
        return gated_residual(x_BND, gate2, self.down(F.silu(self.gate(hidden)) * self.up(hidden)))


def count_block(cfg: ModelConfig, *, batch: int, tokens: int, fused: bool) -> Counts:
    """Traffic of one block, forward and backward; ``fused`` is the model's own, with the Triton operators."""
    counter = TrafficCounter()
    with FakeTensorMode(), _default_dtype(torch.bfloat16):
        block: nn.Module = SeparateBlock(cfg)
        if fused:
            block = Block(
                cfg.dim, cfg.num_heads, mlp_hidden_dim=cfg.mlp_hidden_dim, with_context=True, cast_first=False
            )
            use_kernels(block, "triton")

        def made(*shape: int) -> Tensor:
            return torch.empty(shape, requires_grad=True)

        inputs = made(batch, tokens, cfg.dim), made(batch, 1, cfg.dim)
        angles, context = (
            torch.empty(tokens, cfg.head_dim // 2, dtype=torch.float32),
            made(batch, cfg.text_tokens, cfg.dim),
        )
        with counter.passing("forward"):
            out = block(*inputs, angles, context)
        with counter.passing("backward"):
            out.backward(torch.empty_like(out))
    return counter.counts


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def group(name: str) -> str:
    """``GEMM``, ``attention`` or ``rest``."""
    return "GEMM" if name in GEMMS else "attention" if "scaled_dot_product" in name else "rest"


def total(counts: Counts, wanted: str = "rest") -> int:
    """Bytes of a group, read and written in both passes."""
    return sum(t.read + t.written for one in counts.values() for name, t in one.items() if group(name) == wanted)


def saved(before: Counts, after: Counts) -> float:
    """Share of the bytes outside GEMMs and attention that ``after`` does not move."""
    return 1 - total(after) / total(before)


def show(counts: Counts, title: str, console: Console) -> None:
    """A table by operation in MiB, largest first."""
    table = Table("operation", "calls", "read", "written", "calls", "read", "written", "both passes", title=title)
    names = {name for one in counts.values() for name in one}
    size = {n: sum(one[n].read + one[n].written for one in counts.values() if n in one) for n in names}
    for kind in ("rest", "GEMM", "attention"):
        for name in sorted((n for n in names if group(n) == kind), key=lambda n: -size[n]):
            found = [one.get(name, Traffic()) for one in counts.values()]
            cells = [(str(t.calls), f"{t.read / 2**20:.1f}", f"{t.written / 2**20:.1f}") for t in found]
            table.add_row(name, *cells[0], *cells[1], f"{size[name] / 2**20:.1f}")
        table.add_section()
        table.add_row(f"sum: {kind}", *[""] * 6, f"{total(counts, kind) / 2**20:.1f}")
        table.add_section()
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where the fusions save less than promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for a JSON file")
    args = parser.parse_args(argv)
    cfg, console, stages, enough = load_config(CONFIG, []), Console(width=115), {}, True
    for stage in cfg.stages:
        tokens = (stage.resolution // cfg.model.patch_size) ** 2
        both = {}
        for name, fused in (("separate", False), ("fused", True)):
            both[name] = count_block(cfg.model, batch=stage.micro_batch, tokens=tokens, fused=fused)
            where = f"{stage.resolution} px, micro-batch {stage.micro_batch}"
            show(both[name], f"{name}: an image block at {where}; MiB forward | backward", console)
        share = saved(both["separate"], both["fused"])
        enough &= share >= LEAST_SAVED
        console.print(f"outside GEMMs and attention: {share:.1%} fewer bytes (at least {LEAST_SAVED:.0%})\n")
        plain = {
            name: {part: {op: dataclasses.asdict(t) for op, t in one.items()} for part, one in counts.items()}
            for name, counts in both.items()
        }
        stages[stage.name] = {"micro_batch": stage.micro_batch, "tokens": tokens, "saved": share, **plain}
    if args.out:
        result = {**record.origin(), "kind": "traffic", "torch": torch.__version__, "stages": stages}
        record.write(result, args.out, "traffic", console)
    return 0 if enough else 1


if __name__ == "__main__":
    raise SystemExit(main())
