"""Applies parallelism to a finished objective from outside, in one order for training and sampling."""

from collections.abc import Callable, Iterable

from torch import nn

from deco_scale.models.config import ActivationCheckpointing
from deco_scale.objectives import Objective
from deco_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.precision import fp8
from deco_scale.precision.fp8_plan import Fp8Plan


def parallelize(
    objective: Objective,
    *,
    fp8_plan: Fp8Plan | None = None,
    bias_share: int = 1,
    release_weights: bool = False,
    tensor_parallel: Callable[[Objective], TokenShard] | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    compile_modules: Iterable[nn.Module] = (),
    shard: Callable[[Objective], None] | None = None,
) -> TokenShard | None:
    """Change ``objective`` (meta device or real) in place; returns the tp group where there is one.

    Each step needs the one before it:

    1. FP8 linears (:func:`deco_scale.precision.fp8.apply_fp8`) replace modules, and would drop hooks on them.
    2. ``tensor_parallel`` puts hooks on linears and wraps blocks. Megatron's linears must be built before, with
       the model, inside of ``deepspeed.zero.Init``; only their collectives are installed here.
    3. Activation checkpointing wraps the blocks, so that their collectives run again in backward.
    4. ``compile_modules`` are compiled with the checkpointing inside. The blocks of
       :func:`deco_scale.parallel.tensor_parallel.apply_tensor_parallel` are not among them: it compiles beneath
       the wrapper that unwraps DTensors, in step 2.
    5. ``shard`` (FSDP2, or ``deepspeed.initialize``) gathers weights around all of this.
    """
    if fp8_plan is not None:
        fp8.apply_fp8(objective.denoiser, fp8_plan, bias_share=bias_share, release_weights=release_weights)
    tokens = None if tensor_parallel is None else tensor_parallel(objective)
    apply_activation_checkpointing(
        objective.denoiser.transformer_blocks,
        activation_checkpointing,
        function=fp8.checkpoint_function(fp8_plan),
    )
    for module in compile_modules:
        module.compile()
    if shard is not None:
        shard(objective)
    return tokens
