"""Every parameter's part on a rank, and the peak memory of one rank: state, activations, working buffers.

The mesh need not exist. Activations are the bytes that autograd saves for backward, counted tensor by tensor from
the model's formulas; ``tests/unit/planning/test_costs.py`` compares with what autograd saves of a small model.
Small tensors (times, modulations, statistics of norms) are left out.

Letters: a bytes of an element in the compute type, D model width, h hidden units over D, r text tokens over
image tokens.
"""

import math
import re
from collections import Counter
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from deco_scale.kernels.pixel_decoder import CHUNK_PIXELS
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import Split, check_tp, split_dim, split_of
from deco_scale.parallel.config import BLOCKS_GATHERED, ParallelConfig
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.flops import TrainStep, Workload

FP32 = 4


class Row(NamedTuple):
    """One parameter of the layout table; ``local_bytes`` is a rank's share in fp32."""

    name: str
    global_shape: tuple[int, ...]
    split: Split
    tp_shape: tuple[int, ...]
    local_bytes: int
    of_linear: bool

    @property
    def tp_numel(self) -> int:
        """Elements of a tp rank's part."""
        return math.prod(self.tp_shape)

    @property
    def unit(self) -> str:
        """The module with this parameter that FSDP shards by itself; empty for the root."""
        return _unit_of(self.name)


@lru_cache(maxsize=4096)
def _unit_of(name: str) -> str:
    match = re.match(r"((?:text_)?blocks\.\d+|decoder)\.", name)
    return match[1] if match else ""


@lru_cache(maxsize=32)
def _modules(cfg: ModelConfig) -> list[tuple[str, nn.Module]]:
    with torch.device("meta"):
        return list(Denoiser(cfg).named_modules())


@lru_cache(maxsize=512)
def layout_rows(cfg: ModelConfig, dims: ParallelDims) -> tuple[Row, ...]:
    """The plan of each parameter of the denoiser for a mesh; FSDP and ZeRO-3 cut ``tp_shape`` over dp_shard."""
    check_tp(cfg, dims.tp)
    rows = []
    for path, module in _modules(cfg):
        for own, parameter in module.named_parameters(recurse=False):
            name, shape = f"{path}.{own}", list(parameter.shape)
            dim = split_dim(name)
            if dim is not None:
                shape[dim] //= dims.tp
            local = 4 * -(-shape[0] // dims.dp_shard) * math.prod(shape[1:])
            is_linear = isinstance(module, nn.Linear)
            rows.append(Row(name, tuple(parameter.shape), split_of(name), tuple(shape), local, is_linear))
    return tuple(rows)


class RankElements(NamedTuple):
    """Elements of the denoiser on one rank: its tp shard, that shard divided over dp, and units of it.

    ``largest_gathered`` and ``gathered_units`` are those of fsdp where weights stay gathered.
    """

    full: int
    sharded: int
    root: int
    largest_unit: int
    num_units: int
    largest_gathered: int
    gathered_units: int
    largest_weight: int
    of_linears: int
    persistent: int


def num_gathered(step: TrainStep) -> int:
    """Units that the engine gathers and reduces one after the other: blocks, several of them, and the decoder."""
    elements = rank_elements(step.work.model, step.dims, step.work.persistent)
    several = step.parallel.engine == "fsdp" and step.keeps_weights
    return elements.gathered_units if several else elements.num_units


@lru_cache(maxsize=512)
def rank_elements(model: ModelConfig, dims: ParallelDims, persistent: int) -> RankElements:
    """Counts for a mesh; ``persistent`` is ZeRO-3's limit below which a weight is not sharded."""
    units: Counter[str] = Counter()
    rows = layout_rows(model, dims)
    sizes = [row.tp_numel for row in rows]
    for row, size in zip(rows, sizes, strict=True):
        units[row.unit] += size
    root, gathered = units.pop("", 0), Counter[str]()
    for unit, size in units.items():
        kind, _, number = unit.rpartition(".")
        gathered[f"{kind}.{int(number) // BLOCKS_GATHERED}" if kind else unit] += size
    return RankElements(
        full=sum(sizes),
        sharded=sum(row.local_bytes // FP32 for row in rows),
        root=root,
        largest_unit=max(units.values()),
        num_units=len(units),
        largest_gathered=max(gathered.values()),
        gathered_units=len(gathered),
        largest_weight=max(sizes),
        of_linears=sum(size for row, size in zip(rows, sizes, strict=True) if row.of_linear),
        persistent=sum(size for size in sizes if size <= persistent),
    )


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
    sharded, full = zip(*state_by_part(engine, zero_stage).values(), strict=True)
    return sum(sharded), sum(full)


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

    fsdp: the root stays gathered, one unit computes while the next arrives (or all stay gathered), one unit's
    gradient is reduced in fp32; before the last micro-batch gradients are not sharded. One process alone has
    autocast's copies of the linears' weights. DeepSpeed: its buckets, one for each number
    format; ZeRO-0 to 2 keep bf16 copies of the linears' weights between the passes, ZeRO-3 gathers ahead.
    """
    work, stage, a = step.work, step.parallel.zero_stage, step.work.compute_bytes
    elements = rank_elements(work.model, step.dims, work.persistent)
    mixed = a != FP32
    if step.parallel.engine == "fsdp" and step.dims.dp * step.dims.tp == 1:
        return a * (elements.of_linears + work.repa_parameters) if mixed else 0
    if step.parallel.engine == "fsdp":
        units = elements.full - elements.root if step.keeps_weights else 2 * elements.largest_unit
        gathered = a * (elements.root + work.repa_parameters + units)
        reduced = (a + FP32) * (elements.largest_gathered if step.keeps_weights else elements.largest_unit)
        return gathered + reduced + FP32 * (elements.full + work.repa_parameters) * (step.accumulation > 1)
    if stage == 3:
        buckets = work.reduce_bucket * (a + FP32 if mixed else FP32)
        if step.keeps_weights:
            linears = elements.of_linears + work.repa_parameters
            return buckets + a * linears + FP32 * (elements.full - elements.of_linears)
        ahead = a * (work.prefetch_bucket + 2 * elements.largest_weight)
        return buckets + ahead + FP32 * elements.persistent
    copies = a * elements.of_linears if mixed else 0
    # ZeRO-0 has no bucket; ZeRO-2 overlaps the reduction, which takes a second set.
    sets = stage * (2 if mixed else 1)
    return copies + work.reduce_bucket * FP32 * sets


def block_saved(
    work: Workload, *, tokens: int, context: int, tp: int, mode: ActivationCheckpointing = "none"
) -> float:
    """Bytes of one image in one block, on one of ``tp`` ranks; what a recomputing ``mode`` keeps, or everything.

    ``context`` counts text tokens that are extra keys and values. The eager path casts to fp32 around
    each norm; fused kernels and compiled blocks keep their inputs only.
    """
    a, model = work.compute_bytes, work.model
    hidden = model.mlp_hidden_dim / model.dim
    r = context / tokens
    if mode != "none":
        # The input. Selective: results of qkv, attention, projection, gate, up and down, and the text's keys and
        # values as well.
        results = 6 + 2 * hidden + 2 * context / tokens if mode == "selective" else 0
        return tokens * model.dim * a / tp + tokens * model.dim * a * results / tp
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
    products = (3 if lean else 4) * hidden * a
    split = before + attended + texts + a + products
    return tokens * model.dim * (own / tp + modulated + split / tp)


CHUNK_NARROW, CHUNK_WIDE = (3, 10), (5, 2)
"""Values for each pixel and unit of width that a chunk of the torch decoder holds in backward, in the compute type
and in fp32: fixed, and for each block."""


def activation_bytes(step: TrainStep, *, kind: str) -> dict[str, float]:
    """Of a micro-batch: kept by blocks and outside, and what backward needs for a moment."""
    work, model, images, tp, tokens = step.work, step.work.model, step.micro_batch, step.dims.tp, step.tokens
    a, area, text = work.compute_bytes, step.resolution**2, model.text_tokens
    values, cast = model.channels * area, work.compute_bytes != FP32
    mode = step.parallel.activation_checkpointing
    blocks = model.num_blocks * block_saved(work, tokens=tokens, context=text, tp=tp, mode=mode)
    if model.num_text_blocks:
        blocks += model.num_text_blocks * block_saved(work, tokens=text, context=0, tp=tp, mode=mode)
    # Image and noise stay as the step's arguments, beside the patches. Text states: as they come and as they are
    # cast, and what embedding them keeps.
    inputs = values * (2 * FP32 + a) + text * (model.text_dim * (FP32 + a * cast) + model.dim * 3 * FP32)
    # Prediction, target and coefficients, in fp32 whatever computes.
    losses = values * 3 * FP32
    if work.repa_dim:
        losses += tokens * (5 * a * model.dim + 2 * FP32 * work.repa_dim)
    decoder = 2 * a * tokens * model.dim
    if model.decoder_width:
        decoder += values * FP32 * cast + a * area * model.decoder_width
    # The torch decoder's weights as its products take them.
    taken = 5 * model.decoder_blocks * model.decoder_width**2 + model.patch_size**2 * model.decoder_width
    # Gradients of gate, up and their product; with recomputation a block's activations as well.
    moment = 3.0 * a * tokens * model.mlp_hidden_dim / tp
    if step.recomputes:
        moment += block_saved(work, tokens=tokens, context=text, tp=tp)
    # Backward through one chunk of the torch decoder; the fused one holds none.
    pixels = 0.0 if work.fused else min(CHUNK_PIXELS[kind], images * area / tp)
    narrow, wide = (fixed + block * model.decoder_blocks for fixed, block in (CHUNK_NARROW, CHUNK_WIDE))
    chunk = pixels * model.decoder_width * (a * narrow + FP32 * wide)
    return {
        "activations of blocks": images * blocks,
        "inputs": images * inputs,
        "losses": images * (losses / tp),
        "decoder": images * (decoder / tp) + (0 if work.fused else a * taken),
        "held for a moment": max(images * moment, chunk),
    }


RESERVE_BYTES = {"cuda": 2 * 2**30, "cpu": 600 * 2**20}
"""Assumed: CUDA context and NCCL's buffers; on a CPU a process with PyTorch loaded."""


def memory_by_part(step: TrainStep, *, kind: str) -> dict[str, float]:
    """Bytes of a rank at its peak, in backward of the last micro-batch; the parts sum to the whole."""
    size = 2 if kind == "cuda" else FP32
    return {
        **state_bytes(step.work, step.parallel, step.dims),
        "working weights": working_bytes(step),
        **activation_bytes(step, kind=kind),
        "encoders": sum(size * encoder.parameters for encoder in step.work.encoders),
        "reserve": float(RESERVE_BYTES[kind]),
    }
