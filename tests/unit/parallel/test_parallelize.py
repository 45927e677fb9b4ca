"""The order in which parallelism is applied, seen from its steps."""

import torch
from torch import nn

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.parallelize import parallelize
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.precision.fp8_plan import Fp8Linear, Fp8Plan
from deco_scale.precision.recipe import Fp8Choice

MODEL = ModelConfig(
    kind="c2i_deco", dim=16, num_heads=2, num_blocks=2, patch_size=8, decoder_width=8, decoder_blocks=1,
    num_classes=3,
)  # fmt: skip


def test_steps_are_applied_in_the_documented_order() -> None:
    with torch.device("meta"):
        objective = Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)
    block = objective.denoiser.blocks[0]
    plain_linear, plain_forward = block.mlp.gate_up, block.forward
    shard_of_tokens = object.__new__(TokenShard)
    steps = []

    def state() -> tuple[bool, bool, bool]:
        compiled = hasattr(block.forward, "_torchdynamo_orig_callable")
        return block.mlp.gate_up is not plain_linear, block.forward != plain_forward, compiled

    def tensor_parallel(given: Objective) -> TokenShard:
        assert given is objective
        steps.append(("tensor parallel", state()))
        return shard_of_tokens

    def shard(given: nn.Module) -> None:
        assert given is objective
        steps.append(("shard", state()))

    linear = Fp8Linear("blocks.0.mlp.gate_up", 16, 2 * MODEL.mlp_hidden_dim, False, "column")
    tokens = parallelize(
        objective,
        fp8_plan=Fp8Plan(Fp8Choice("torchao", "current", emulate=True), (linear,), ()),
        tensor_parallel=tensor_parallel,
        activation_checkpointing="full",
        compiled=objective.denoiser.transformer_blocks,
        shard=shard,
    )
    assert tokens is shard_of_tokens
    # FP8 linears, checkpointing, compile: FP8 comes before tensor parallelism, and all of them before sharding.
    assert steps == [("tensor parallel", (True, False, False)), ("shard", (True, True, True))]


def test_without_options_nothing_changes() -> None:
    with torch.device("meta"):
        objective = Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)
    block = objective.denoiser.blocks[0]
    before = block.forward
    assert parallelize(objective) is None
    assert block.forward == before
