"""Peak memory of one rank, by part."""

from dataclasses import dataclass
from functools import lru_cache

from deco_scale.kernels.pixels import CHUNK_PIXELS
from deco_scale.models import ModelConfig
from deco_scale.parallel.layout import Layout, ParallelConfig
from deco_scale.parallel.plan import layout_rows, weights_of_linears
from deco_scale.planning.activations import block_kept, block_saved, decoder_chunk, outside_saved
from deco_scale.planning.state import state_by_part
from deco_scale.planning.workload import Workload

FP32 = 4
UNITS = ("blocks.", "text_blocks.", "decoder.")
RESERVE_BYTES = {"cuda": 2 * 2**30, "cpu": 600 * 2**20}
"""Assumed: CUDA context and NCCL's buffers; on a CPU a process with PyTorch loaded."""
MARGIN = 0.08
"""Share of a GPU's memory that a plan leaves free, for fragmentation and what is not counted."""


@dataclass(frozen=True, slots=True)
class Held:
    """Elements of the denoiser on one rank: its tp part, that part cut over dp, and of it by unit."""

    whole: int
    cut: int
    root: int
    largest_unit: int
    largest_weight: int
    of_linears: int
    persistent: int


@lru_cache(maxsize=512)
def held_elements(model: ModelConfig, layout: Layout, persistent: int) -> Held:
    """Counts for a mesh; ``persistent`` is ZeRO-3's limit below which a weight stays whole."""
    units: dict[str, int] = {}
    whole = cut = root = largest = of_linears = kept = 0
    linears = weights_of_linears(model)
    for row in layout_rows(model, layout):
        count = row.tp_numel
        whole, cut = whole + count, cut + row.local_bytes // FP32
        largest = max(largest, count)
        of_linears += count if row.name in linears else 0
        kept += count if count <= persistent else 0
        if row.name.startswith(UNITS):
            unit = "decoder" if row.name.startswith("decoder.") else ".".join(row.name.split(".")[:2])
            units[unit] = units.get(unit, 0) + count
        else:
            root += count
    return Held(whole, cut, root, max(units.values()), largest, of_linears, kept)


def state_bytes(work: Workload, parallel: ParallelConfig, layout: Layout) -> dict[str, float]:
    """fp32 weights, masters, gradients, moments and average of a rank; the REPA head has no average."""
    held = held_elements(work.model, layout, work.persistent)
    head = work.repa_parameters
    found: dict[str, float] = {}
    head_cut = head / (layout.dp_shard if parallel.engine == "fsdp" else layout.dp)
    for part, (cut, whole) in state_by_part(parallel.engine, parallel.zero_stage).items():
        elements: float = cut * held.cut + whole * held.whole
        if part != "average":
            elements += cut * head_cut + whole * head
        found[part] = FP32 * elements
    return found


def working_bytes(work: Workload, parallel: ParallelConfig, layout: Layout, *, accumulation: int) -> float:
    """Gathered or cast weights, and buffers of the engine's reductions.

    fsdp: the root stays gathered, one unit computes while the next arrives, one unit's gradient is reduced in
    fp32; before the last micro-batch gradients are kept whole. DeepSpeed: its buckets, one for each number
    format; ZeRO-0 to 2 keep bf16 copies of the linears' weights between the passes, ZeRO-3 gathers ahead.
    """
    held, a = held_elements(work.model, layout, work.persistent), work.compute_bytes
    if parallel.engine == "fsdp":
        gathered = a * (held.root + work.repa_parameters + 2 * held.largest_unit)
        reduced = (a + FP32) * held.largest_unit
        return gathered + reduced + (FP32 * (held.whole + work.repa_parameters) if accumulation > 1 else 0)
    mixed = a != FP32
    if parallel.zero_stage == 3:
        buckets = work.reduce_bucket * (a + FP32 if mixed else FP32)
        ahead = a * (work.prefetch_bucket + 2 * held.largest_weight)
        return buckets + ahead + FP32 * held.persistent
    copies = a * held.of_linears if mixed else 0
    if parallel.zero_stage == 0:
        return copies
    # ZeRO-2 overlaps the reduction, which takes a second set.
    return copies + work.reduce_bucket * FP32 * (2 if mixed else 1) * (2 if parallel.zero_stage == 2 else 1)


def activation_bytes(
    work: Workload, parallel: ParallelConfig, layout: Layout, *, images: int, resolution: int, kind: str
) -> dict[str, float]:
    """Of a micro-batch of ``images``: kept by blocks and outside, and what backward holds for a moment."""
    model, mode, tp = work.model, parallel.activation_checkpointing, layout.tp
    rows, cols = model.grid(resolution, resolution)
    tokens, text = rows * cols, model.text_tokens
    image_block = {"tokens": tokens, "context": text, "tp": tp}
    text_block = {"tokens": text, "context": 0, "tp": tp}
    kept = model.num_blocks * block_kept(work, mode=mode, **image_block)
    if model.num_text_blocks:
        kept += model.num_text_blocks * block_kept(work, mode=mode, **text_block)
    outside = outside_saved(work, resolution=resolution, tp=tp)
    # Gradients of gate, up and their product; with recomputation a block's activations as well.
    moment = 3.0 * work.compute_bytes * tokens * model.mlp_hidden_dim / tp
    if mode != "none":
        moment += block_saved(work, **image_block)
    chunk = decoder_chunk(work, images=images, resolution=resolution, chunk_pixels=CHUNK_PIXELS[kind], tp=tp)
    found = {"blocks": images * kept, **{name: images * size for name, size in outside.items()}}
    return {**found, "moment": max(images * moment, chunk)}


def memory_by_part(
    work: Workload,
    parallel: ParallelConfig,
    layout: Layout,
    *,
    images: int,
    accumulation: int,
    resolution: int,
    kind: str,
) -> dict[str, float]:
    """Bytes of a rank at its peak, in backward of the last micro-batch; the parts sum to the whole."""
    activations = activation_bytes(work, parallel, layout, images=images, resolution=resolution, kind=kind)
    size = 2 if kind == "cuda" else FP32
    return {
        **state_bytes(work, parallel, layout),
        "working weights": working_bytes(work, parallel, layout, accumulation=accumulation),
        "activations of blocks": activations["blocks"],
        "inputs": activations["inputs"],
        "losses": activations["losses"],
        "decoder": activations["decoder"],
        "held for a moment": activations["moment"],
        "encoders": sum(size * encoder.parameters for encoder in work.encoders),
        "reserve": float(RESERVE_BYTES[kind]),
    }
