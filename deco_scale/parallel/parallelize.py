"""Applies parallelism to a finished objective from outside, in one order for training and sampling."""

from collections.abc import Callable, Collection

from torch import nn

from deco_scale.models.compile import compile_modules
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
    show_local_weights: Callable[[nn.Module], None] | None = None,
    activation_checkpointing: ActivationCheckpointing = "none",
    compiled: Collection[nn.Module] = (),
    compile_fallback: bool = False,
    shard: Callable[[Objective], None] | None = None,
) -> TokenShard | None:
    """Change ``objective`` (meta device or real) in place; returns the tp group where there is one.

    Each step needs the one before it:

    1. FP8 linears (:func:`deco_scale.precision.fp8.apply_fp8`) replace modules, whose class ``tensor_parallel``
       changes.
    2. ``tensor_parallel`` splits parameters and routes tokens.
    3. Activation checkpointing wraps the blocks, so that their collectives run again in backward.
    4. ``compiled`` modules are compiled with the checkpointing inside, without graph breaks
       (:func:`deco_scale.models.compile.compile_modules`). ``show_local_weights`` unwraps the DTensors of
       tensor parallelism around a unit's compiled code, or, where it is not compiled, inside of the checkpointing.
    5. ``shard`` (FSDP2, or ``deepspeed.initialize``) gathers weights around all of this.
    """
    denoiser = objective.denoiser
    if fp8_plan is not None:
        fp8.apply_fp8(denoiser, fp8_plan, bias_share=bias_share, release_weights=release_weights)
    tokens = None if tensor_parallel is None else tensor_parallel(objective)
    unwrap = show_local_weights or (lambda unit: None)
    for unit in denoiser.units:
        if unit not in compiled:
            unwrap(unit)
    apply_activation_checkpointing(
        denoiser.transformer_blocks, activation_checkpointing, function=fp8.checkpoint_function(fp8_plan)
    )
    if compiled:
        compile_modules(compiled, fall_back=compile_fallback)
    for unit in compiled:
        unwrap(unit)
    if shard is not None:
        shard(objective)
    return tokens
