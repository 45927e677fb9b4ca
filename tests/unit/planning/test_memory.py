"""The memory plan against counts of the model's own modules: gathered weights, buckets, moments of backward."""

import dataclasses
from typing import Any

import pytest
import torch

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.engines.fsdp import shard_units
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.flops import Encoder, TrainStep, Workload
from deco_scale.planning.memory import (
    RESERVE_BYTES,
    activation_bytes,
    block_saved,
    memory_by_part,
    rank_elements,
    working_bytes,
)

LARGE_DECODER = ModelConfig(
    kind="t2i_deco", dim=64, num_heads=4, num_blocks=3, num_text_blocks=2, patch_size=16, decoder_width=16,
    decoder_blocks=2, text_dim=48, text_tokens=8,
)  # fmt: skip
LARGE_BLOCKS = dataclasses.replace(LARGE_DECODER, decoder_width=1)
BASELINE = ModelConfig(kind="c2i_baseline", dim=64, num_heads=4, num_blocks=3, num_classes=10)
MODELS = pytest.mark.parametrize(
    "model", [LARGE_DECODER, LARGE_BLOCKS, BASELINE], ids=["decoder", "blocks", "class"]
)
CUT_BY_TP = ("attn.qkv.weight", "attn.context_kv.weight", "attn.proj.weight", "mlp.gate_up.weight",
             "mlp.down.weight")  # fmt: skip


def train_step(work: Workload, parallel: ParallelConfig, dims: ParallelDims, **sizes: int) -> TrainStep:
    sizes = {"micro_batch": 2, "accumulation": 1, "resolution": 64, **sizes}
    return TrainStep(work=work, parallel=parallel, dims=dims, **sizes)


def units_of(model: ModelConfig, tp: int, *, reshard_after_forward: bool = True) -> tuple[int, list[int]]:
    """Parameters of a tp rank outside of the units that FSDP gathers, and in each of those."""
    with torch.device("meta"):
        denoiser = Denoiser(model)

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() // (tp if name.endswith(CUT_BY_TP) else 1) for name, p in module.named_parameters())

    grouped = shard_units(denoiser, reshard_after_forward=reshard_after_forward)
    units = [sum(map(count, modules)) for modules in grouped]
    return count(denoiser) - sum(units), units


@MODELS
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_fsdp_gathers_the_root_and_two_units_and_reduces_one(
    model: ModelConfig, compute: Any, tp: int, accumulation: int
) -> None:
    work = Workload(model=model, compute=compute, repa_dim=20)
    root, units = units_of(model, tp)
    size = 4 if compute == "fp32" else 2
    # One unit computes while the next one arrives.
    gathered = size * (root + work.repa_parameters + 2 * max(units))
    reduced = (size + 4) * max(units)
    # Until the last micro-batch gradients stay whole, in fp32.
    kept = 4 * (root + sum(units) + work.repa_parameters) if accumulation > 1 else 0
    for shard in (2, 4):
        parallel, dims = ParallelConfig(dp_shard=shard, tp=tp), ParallelDims(1, shard, tp)
        step = train_step(work, parallel, dims, accumulation=accumulation)
        assert working_bytes(step) == gathered + reduced + kept
        # With weights that stay gathered, all units count, and larger ones are reduced.
        parallel = dataclasses.replace(parallel, reshard_after_forward=False)
        step = train_step(work, parallel, dims, accumulation=accumulation)
        _, larger = units_of(model, tp, reshard_after_forward=False)
        whole = size * (root + work.repa_parameters + sum(units))
        assert working_bytes(step) == whole + (size + 4) * max(larger) + kept


@MODELS
def test_one_process_has_no_gathered_weights(model: ModelConfig) -> None:
    work, parallel, dims = Workload(model=model, compute="bf16"), ParallelConfig(), ParallelDims(1, 1, 1)
    linears = rank_elements(model, dims, 0).of_linears
    # What autocast keeps of them; gradients are those of the state.
    assert working_bytes(train_step(work, parallel, dims, accumulation=4)) == 2 * linears
    work = dataclasses.replace(work, compute="fp32")
    assert working_bytes(train_step(work, parallel, dims, accumulation=4)) == 0


def test_the_two_models_differ_in_what_their_largest_unit_is() -> None:
    for model, largest_is_last in ((LARGE_DECODER, True), (LARGE_BLOCKS, False)):
        _, units = units_of(model, 1)
        assert (units[-1] == max(units)) is largest_is_last


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_has_buckets_and_copies_of_the_linears(compute: Any, stage: Any) -> None:
    work = Workload(model=LARGE_BLOCKS, compute=compute, persistent=500, reduce_bucket=1000, prefetch_bucket=300)
    with torch.device("meta"):
        denoiser = Denoiser(LARGE_BLOCKS)
    linears = sum(
        p.numel()
        for m in denoiser.modules()
        if isinstance(m, torch.nn.Linear)
        for p in m.parameters(recurse=False)
    )
    counts = [p.numel() for p in denoiser.parameters()]
    small, is_mixed = sum(c for c in counts if c <= 500), compute == "bf16"
    copies = 2 * linears if is_mixed else 0
    expected = {
        0: copies,
        1: copies + 4 * 1000 * (2 if is_mixed else 1),
        # Reduction and backward overlap.
        2: copies + 2 * 4 * 1000 * (2 if is_mixed else 1),
        3: 1000 * (6 if is_mixed else 4) + (2 if is_mixed else 4) * (300 + 2 * max(counts)) + 4 * small,
    }[stage]
    parallel = ParallelConfig(engine="deepspeed", zero_stage=stage, dp_shard=2)
    assert working_bytes(train_step(work, parallel, ParallelDims(1, 2), accumulation=4)) == expected


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("tp", [1, 2])
def test_what_backward_holds_for_a_moment(mode: Any, tp: int) -> None:
    """Gradients of gate, up and their product; a block's activations as well where they are recomputed."""
    work = Workload(model=LARGE_BLOCKS, compute="bf16", fused=True)
    parallel, tokens = ParallelConfig(dp_shard=1, tp=tp, activation_checkpointing=mode), (64 // 16) ** 2
    found = activation_bytes(train_step(work, parallel, ParallelDims(1, 1, tp), micro_batch=3), kind="cuda")
    expected = 2 * 3 * tokens * 4 * LARGE_BLOCKS.dim / tp
    if mode != "none":
        expected += block_saved(work, tokens=tokens, context=LARGE_BLOCKS.text_tokens, tp=tp)
    assert found["held for a moment"] == pytest.approx(3 * expected)


@MODELS
def test_what_is_kept_grows_with_the_images(model: ModelConfig) -> None:
    work, parallel = Workload(model=model, compute="bf16", fused=True), ParallelConfig(dp_shard=1)
    one, five = (
        activation_bytes(train_step(work, parallel, ParallelDims(1, 1), micro_batch=images), kind="cuda")
        for images in (1, 5)
    )
    assert five == pytest.approx({part: 5 * size for part, size in one.items()})


@pytest.mark.parametrize(("kind", "size"), [("cuda", 2), ("cpu", 4)])
def test_the_parts_are_all_there(kind: str, size: int) -> None:
    encoders = (
        Encoder(name="a", parameters=1e6, multiplied=1e6, operations=10),
        Encoder(name="b", parameters=2e6, multiplied=1e6, operations=10),
    )
    work = Workload(model=LARGE_DECODER, compute="bf16", encoders=encoders)
    step = train_step(work, ParallelConfig(dp_shard=2), ParallelDims(1, 2))
    parts = memory_by_part(step, kind=kind)
    assert parts["encoders"] == size * 3e6 and parts["reserve"] == RESERVE_BYTES[kind]
    assert parts["working weights"] == working_bytes(step)
    assert activation_bytes(step, kind=kind).items() <= parts.items()
    assert min(parts.values()) > 0
