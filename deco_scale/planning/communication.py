"""What a training step sends under either engine, from the configuration alone.

Bytes are those of the whole tensor that a collective assembles or reduces, per rank and step: outputs of
all-gathers, inputs of reduce-scatters and all-reduces. Scalars (losses, norm) are left out.
``tests/distributed/test_communication.py`` counts a real step and compares.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deco_scale.models import ModelConfig
from deco_scale.parallel.layout import ActivationCheckpointing, Layout
from deco_scale.parallel.plan import layout_rows, weights_of_linears
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
    rows = layout_rows(cfg, layout)
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
        # FSDP hands every block its inputs in the compute type, the text tokens too.
        yield from _tensor_parallel(cfg, layout, step, reductions=1, text_bytes=step.compute_bytes)


def zero_traffic(
    cfg: ModelConfig, layout: Layout, step: StepShape, *, stage: int, persistent: int
) -> Iterator[Traffic]:
    """The same for DeepSpeed's ZeRO.

    Weights of at most ``persistent`` elements stay gathered under ZeRO-3 (its
    ``stage3_param_persistence_threshold``). Its prefetch may find up to one bucket of weights still there
    when backward begins; that saving is left out.
    """
    rows = layout_rows(cfg, layout)
    linear = weights_of_linears(cfg)
    dp, micros = layout.dp, step.accumulation

    def sent(name: str) -> int:
        """Bytes an element: ZeRO sends what linears own in the compute type, the rest in fp32."""
        return step.compute_bytes if stage and name in linear else FP32_BYTES

    if dp > 1 and stage < 3:
        gradients = sum(row.tp_numel * sent(row.name) for row in rows)
        # ZeRO-2 keeps only its part of a gradient, so every micro-batch is reduced.
        yield Traffic("gradients", "all-reduce", "dp", gradients * (micros if stage == 2 else 1))
        if stage:
            alignment = 2 * dp
            elements = -(-sum(row.tp_numel for row in rows) // alignment) * alignment
            yield Traffic("weights", "all-gather", "dp", elements * FP32_BYTES)
    if dp > 1 and stage == 3:
        gathered = reduced = 0
        for row in rows:
            part = -(-row.tp_numel // dp) * dp
            reduced += micros * part * sent(row.name)
            if row.tp_numel <= persistent:
                gathered += part * FP32_BYTES
            else:
                gathered += 2 * micros * part * sent(row.name)
        yield Traffic("weights", "all-gather", "dp", gathered)
        yield Traffic("gradients", "reduce-scatter", "dp", reduced)
    if layout.tp > 1:
        yield from _tensor_parallel(cfg, layout, step, reductions=micros, text_bytes=FP32_BYTES)


def _tensor_parallel(
    cfg: ModelConfig, layout: Layout, step: StepShape, *, reductions: int, text_bytes: int
) -> Iterator[Traffic]:
    """``reductions``: how often in a step the gradients of replicated weights are summed.

    ``text_bytes``: size of an element of the text tokens as they leave the last text block.
    """
    tp = layout.tp
    replicated = sum(row.tp_numel for row in layout_rows(cfg, layout) if row.split == "replicated")

    def sent(tokens: int, element_bytes: int = step.compute_bytes) -> int:
        """Bytes of one gather or scatter of a sequence, parts padded to the longest."""
        return step.micro_batch * tp * part_sizes(tokens, tp)[0] * cfg.dim * element_bytes

    image = cfg.num_blocks * 2 * sent(step.tokens)
    text = cfg.num_text_blocks * 2 * sent(cfg.text_tokens)
    whole_text = sent(cfg.text_tokens, text_bytes) if cfg.num_text_blocks else 0
    # Recomputed blocks gather and scatter once more; the last block's text gather lies outside of it.
    forwards = 1 if step.recompute == "none" else 2
    blocks = image + text
    # Backward turns every gather into a scatter and the other way round.
    gathers = forwards * blocks + blocks + whole_text
    scatters = forwards * blocks + blocks + whole_text
    yield Traffic("tokens", "all-gather", "tp", step.accumulation * gathers)
    yield Traffic("tokens", "reduce-scatter", "tp", step.accumulation * scatters)
    yield Traffic("gradients of replicated weights", "all-reduce", "tp", reductions * replicated * FP32_BYTES)
