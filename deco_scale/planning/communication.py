"""What a training step sends under the fsdp engine, from the configuration alone.

Bytes are those of the whole tensor that a collective assembles or reduces, per rank and step: outputs of
all-gathers, inputs of reduce-scatters and all-reduces. Scalars (losses, norm) are left out.
``tests/distributed/test_communication.py`` counts a real step and compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deco_scale.models import ModelConfig
from deco_scale.parallel.layout import ActivationCheckpointing, Layout
from deco_scale.parallel.plan import layout_rows
from deco_scale.parallel.sequence import part_sizes

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
FP32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Traffic:
    """One line of the table."""

    what: str
    kind: Kind
    axis: str
    bytes: int


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes on one rank."""

    micro_batch: int
    accumulation: int
    tokens: int
    compute_bytes: int
    recompute: ActivationCheckpointing = "none"


def fsdp_traffic(cfg: ModelConfig, layout: Layout, step: StepShape) -> Iterator[Traffic]:
    """Lines for the denoiser (REPA head aside); axes of one rank send nothing."""
    rows = list(layout_rows(cfg, layout))
    shards, micros = layout.dp_shard, step.accumulation

    def padded(row_shape: tuple[int, ...]) -> int:
        """Elements as FSDP sends them: dimension 0 padded to a multiple of the ranks."""
        count = -(-row_shape[0] // shards) * shards
        for size in row_shape[1:]:
            count *= size
        return count

    in_units = ("blocks.", "text_blocks.", "decoder.")
    units = sum(padded(r.tp_shape) for r in rows if r.name.startswith(in_units))
    root = sum(padded(r.tp_shape) for r in rows if not r.name.startswith(in_units))
    if shards > 1:
        # Units are gathered again in backward, what is left stays gathered.
        gathered = micros * (2 * units + root) * step.compute_bytes
        yield Traffic("weights", "all-gather", "dp_shard", gathered)
        yield Traffic("gradients", "reduce-scatter", "dp_shard", (units + root) * FP32_BYTES)
    if layout.dp_replicate > 1:
        yield Traffic("gradients", "all-reduce", "dp_replicate", (units + root) * FP32_BYTES // shards)
    if layout.tp > 1:
        yield from _tensor_parallel(cfg, layout.tp, step, rows_replicated(cfg, layout))


def rows_replicated(cfg: ModelConfig, layout: Layout) -> int:
    """Elements of the weights that every tp rank has whole."""
    total = 0
    for row in layout_rows(cfg, layout):
        if row.split == "replicated":
            count = 1
            for size in row.global_shape:
                count *= size
            total += count
    return total


def _tensor_parallel(cfg: ModelConfig, tp: int, step: StepShape, replicated: int) -> Iterator[Traffic]:
    def sent(tokens: int) -> int:
        """Bytes of one gather or scatter of a sequence, parts padded to the longest."""
        return step.micro_batch * tp * part_sizes(tokens, tp)[0] * cfg.dim * step.compute_bytes

    image = cfg.num_blocks * 2 * sent(step.tokens)
    text = cfg.num_text_blocks * 2 * sent(cfg.text_tokens)
    whole_text = sent(cfg.text_tokens) if cfg.num_text_blocks else 0
    # Recomputed blocks gather and scatter once more; the last block's text gather lies outside of it.
    forwards = 1 if step.recompute == "none" else 2
    blocks = image + text
    # Backward turns every gather into a scatter and the other way round.
    gathers = forwards * blocks + blocks + whole_text
    scatters = forwards * blocks + blocks + whole_text
    yield Traffic("tokens", "all-gather", "tp", step.accumulation * gathers)
    yield Traffic("tokens", "reduce-scatter", "tp", step.accumulation * scatters)
    yield Traffic("gradients of replicated weights", "all-reduce", "tp", replicated * FP32_BYTES)
