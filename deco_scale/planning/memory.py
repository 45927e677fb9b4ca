"""Peak memory of one rank by part: parameters and optimizer state, activations, working buffers.

Activations are the bytes that autograd saves for backward, counted tensor by tensor from the model's formulas;
``tests/unit/planning/test_costs.py`` compares with what autograd saves of a small model. Small tensors (times,
modulations, statistics of norms) are left out.

Letters: a bytes of an element in the compute type, D model width, h hidden units over D, r text tokens over
image tokens.
"""

from dataclasses import dataclass
from functools import lru_cache

from deco_scale.kernels.pixel_decoder import CHUNK_PIXELS
from deco_scale.models import ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.flops import TrainStep, Workload
from deco_scale.planning.parameters import UNITS, layout_rows, weights_of_linears

FP32 = 4
STATE_PARTS = ("weights", "masters", "gradients", "moments", "average")


def state_by_part(engine: str, zero_stage: int) -> dict[str, tuple[int, int]]:
    """For each part: copies of a rank's dp shard, and of its full tp shard, all in fp32.

    fsdp shards weights, gradients, two moments and the average. DeepSpeed keeps masters beside the weights
    and shards, stage by stage: masters, moments and average (1), gradients (2), weights (3). fsdp and ZeRO-3
    are measured by ``tests/distributed/test_memory.py``; the others follow from their definition.
    """
    sharded, full = (1, 0), (0, 1)
    if engine == "fsdp":
        return {"weights": sharded, "gradients": sharded, "moments": (2, 0), "average": sharded}
    if zero_stage == 0:
        return {"weights": full, "gradients": full, "moments": (0, 2), "average": full}
    return {
        "weights": sharded if zero_stage == 3 else full,
        "masters": sharded,
        "gradients": sharded if zero_stage >= 2 else full,
        "moments": (2, 0),
        "average": sharded,
    }


def state_copies(engine: str, zero_stage: int) -> tuple[int, int]:
    """Copies of a rank's dp shard, and of its full tp shard, summed over :func:`state_by_part`."""
    parts = state_by_part(engine, zero_stage).values()
    return sum(sharded for sharded, _ in parts), sum(full for _, full in parts)


CHUNK_FIXED, CHUNK_BLOCK = 4.2, 9.06
"""Values for each pixel and unit of width that a chunk of the torch decoder holds in backward: fixed, and a block;
counted by autograd."""


def block_saved(work: Workload, *, tokens: int, context: int, tp: int) -> float:
    """Bytes of one image in one block that recomputes nothing, on one of ``tp`` ranks.

    ``context`` counts text tokens that are extra keys and values. The eager path casts to fp32 around
    each norm; fused kernels and compiled blocks keep their inputs only.
    """
    a, model = work.compute_bytes, work.model
    hidden = model.mlp_hidden_dim / model.dim
    r = context / tokens
    lean = work.fused or work.compile
    # What a norm multiplies its weight with: the class models cast it first.
    normed = FP32 if model.kind == "t2i_deco" else a
    # The residual stream before each half, each half's result, for the gate.
    own = 4 * a if lean else 2 * (FP32 + normed + a + a)
    modulated = 2 * a
    # Queries, keys and values as attention reads them; with text, keys and values are copied together.
    attended = a + (2 * (1 + r) * a if context else a)
    if lean:
        before, texts = 3 * a, 2 * r * a
    else:
        # fp32 needs no cast: the fused projection's result itself is saved.
        casts = 3 * a if a == FP32 else 2 * FP32 + (0 if context else 3 * a)
        before = casts + 2 * normed
        texts = r * (2 * a + FP32 if a == FP32 else 2 * FP32)
    products = (3 if work.compile else 4) * hidden * a
    split = before + attended + texts + a + products
    return tokens * model.dim * (own / tp + modulated + split / tp)


def block_kept(work: Workload, *, tokens: int, context: int, tp: int, mode: ActivationCheckpointing) -> float:
    """Bytes of one image and block under a recomputing ``mode``: the input, and what ``selective`` keeps."""
    if mode == "none":
        return block_saved(work, tokens=tokens, context=context, tp=tp)
    a, dim = work.compute_bytes, work.model.dim
    saved = tokens * dim * a / tp
    if mode == "selective":
        hidden = work.model.mlp_hidden_dim / dim
        # Results of qkv, attention, projection, gate, up and down, and of the text's keys and values.
        saved += tokens * dim * a * (6 + 2 * hidden + 2 * context / tokens) / tp
    return saved


def outside_saved(work: Workload, *, resolution: int, tp: int) -> dict[str, float]:
    """Bytes of one image that are saved outside of the blocks, by part."""
    a, model = work.compute_bytes, work.model
    mixed = a != FP32
    rows, cols = model.grid(resolution, resolution)
    tokens, values = rows * cols, model.channels * resolution**2
    # Image and noise stay as the step's arguments, beside the patches. Text states: as they come and as they are
    # cast, and what embedding them keeps.
    text = model.text_tokens * (model.text_dim * (FP32 + (a if mixed else 0)) + model.dim * 3 * FP32)
    inputs = values * (2 * FP32 + a) + text
    # Prediction, target and coefficients, in fp32 whatever computes.
    losses = values * 3 * FP32
    if work.repa_dim:
        losses += tokens * (5 * a * model.dim + 2 * FP32 * work.repa_dim)
    decoder = 2 * a * tokens * model.dim
    if model.decoder_width:
        decoder += (values * FP32 if mixed else 0) + a * resolution**2 * model.decoder_width
    return {"inputs": inputs, "losses": losses / tp, "decoder": decoder / tp}


RESERVE_BYTES = {"cuda": 2 * 2**30, "cpu": 600 * 2**20}
"""Assumed: CUDA context and NCCL's buffers; on a CPU a process with PyTorch loaded."""
MARGIN = 0.08
"""Share of a GPU's memory that a plan leaves free, for fragmentation and what is not counted."""


@dataclass(frozen=True, slots=True)
class RankElements:
    """Elements of the denoiser on one rank: its tp shard, that shard divided over dp, and units of it."""

    full: int
    sharded: int
    root: int
    largest_unit: int
    largest_weight: int
    of_linears: int
    persistent: int


@lru_cache(maxsize=512)
def rank_elements(model: ModelConfig, dims: ParallelDims, persistent: int) -> RankElements:
    """Counts for a mesh; ``persistent`` is ZeRO-3's limit below which a weight is not sharded."""
    units: dict[str, int] = {}
    full = sharded = root = largest = of_linears = unsharded = 0
    linears = weights_of_linears(model)
    for row in layout_rows(model, dims):
        count = row.tp_numel
        full, sharded = full + count, sharded + row.local_bytes // FP32
        largest = max(largest, count)
        of_linears += count if row.name in linears else 0
        unsharded += count if count <= persistent else 0
        if row.name.startswith(UNITS):
            unit = "decoder" if row.name.startswith("decoder.") else ".".join(row.name.split(".")[:2])
            units[unit] = units.get(unit, 0) + count
        else:
            root += count
    return RankElements(full, sharded, root, max(units.values()), largest, of_linears, unsharded)


def state_bytes(work: Workload, parallel: ParallelConfig, dims: ParallelDims) -> dict[str, float]:
    """fp32 weights, masters, gradients, moments and average of a rank; the REPA head has no average."""
    elements, head = rank_elements(work.model, dims, work.persistent), work.repa_parameters
    head_sharded = head / (dims.dp_shard if parallel.engine == "fsdp" else dims.dp)
    parts = {}
    for part, (sharded, full) in state_by_part(parallel.engine, parallel.zero_stage).items():
        count: float = sharded * elements.sharded + full * elements.full
        parts[part] = FP32 * (count + (sharded * head_sharded + full * head if part != "average" else 0))
    return parts


def working_bytes(step: TrainStep) -> float:
    """Gathered or cast weights, and buffers of the engine's reductions.

    fsdp: the root stays gathered, one unit computes while the next arrives, one unit's gradient is reduced in
    fp32; before the last micro-batch gradients are not sharded. DeepSpeed: its buckets, one for each number
    format; ZeRO-0 to 2 keep bf16 copies of the linears' weights between the passes, ZeRO-3 gathers ahead.
    """
    work, stage, a = step.work, step.parallel.zero_stage, step.work.compute_bytes
    elements = rank_elements(work.model, step.dims, work.persistent)
    if step.parallel.engine == "fsdp":
        gathered = a * (elements.root + work.repa_parameters + 2 * elements.largest_unit)
        reduced = (a + FP32) * elements.largest_unit
        return gathered + reduced + FP32 * (elements.full + work.repa_parameters) * (step.accumulation > 1)
    mixed = a != FP32
    if stage == 3:
        buckets = work.reduce_bucket * (a + FP32 if mixed else FP32)
        ahead = a * (work.prefetch_bucket + 2 * elements.largest_weight)
        return buckets + ahead + FP32 * elements.persistent
    copies = a * elements.of_linears if mixed else 0
    # ZeRO-0 has no bucket; ZeRO-2 overlaps the reduction, which takes a second set.
    sets = stage * (2 if mixed else 1)
    return copies + work.reduce_bucket * FP32 * sets


def activation_bytes(step: TrainStep, *, kind: str) -> dict[str, float]:
    """Of a micro-batch: kept by blocks and outside, and what backward needs for a moment."""
    work, images, tp = step.work, step.micro_batch, step.dims.tp
    model, mode, tokens = work.model, step.parallel.activation_checkpointing, step.tokens
    saved = model.num_blocks * block_kept(work, tokens=tokens, context=model.text_tokens, tp=tp, mode=mode)
    if model.num_text_blocks:
        saved += model.num_text_blocks * block_kept(work, tokens=model.text_tokens, context=0, tp=tp, mode=mode)
    # Gradients of gate, up and their product; with recomputation a block's activations as well.
    moment = 3.0 * work.compute_bytes * tokens * model.mlp_hidden_dim / tp
    if step.recomputes:
        moment += block_saved(work, tokens=tokens, context=model.text_tokens, tp=tp)
    # Backward through one chunk of the torch decoder; the fused one holds none.
    pixels = 0.0 if work.fused else min(CHUNK_PIXELS[kind], images * step.resolution**2 / tp)
    chunk = pixels * model.decoder_width * work.compute_bytes * (CHUNK_FIXED + CHUNK_BLOCK * model.decoder_blocks)
    outside = outside_saved(work, resolution=step.resolution, tp=tp)
    per_image = {"blocks": saved, **outside}
    return {**{name: images * size for name, size in per_image.items()}, "moment": max(images * moment, chunk)}


def memory_by_part(step: TrainStep, *, kind: str) -> dict[str, float]:
    """Bytes of a rank at its peak, in backward of the last micro-batch; the parts sum to the whole."""
    activations = activation_bytes(step, kind=kind)
    size = 2 if kind == "cuda" else FP32
    return {
        **state_bytes(step.work, step.parallel, step.dims),
        "working weights": working_bytes(step),
        "activations of blocks": activations["blocks"],
        "inputs": activations["inputs"],
        "losses": activations["losses"],
        "decoder": activations["decoder"],
        "held for a moment": activations["moment"],
        "encoders": sum(size * encoder.parameters for encoder in step.work.encoders),
        "reserve": float(RESERVE_BYTES[kind]),
    }
