"""Tensor parallelism with megatron-core's linears, for the DeepSpeed engine.

Plan and movement of tokens are those of :mod:`deco_scale.parallel.tensor_parallel`, but parameters are local
slices in Column- and RowParallelLinear, and ``parallel_state`` gives DeepSpeed the process groups. Megatron's own
sequence parallelism needs token counts that divide by tp, tokens as the first dimension, and CUDA, so
:class:`TokenShard` gathers and scatters around its linears, which compute as plain ones do: so autocast applies on
any device, and compiled blocks trace them.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from deco_scale.models.tp_plan import split_dim, split_of
from deco_scale.objectives import Objective
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.parallel.token_routing import route_tokens


class ModelParallelUnit:
    """``parallel_state`` under the three older names that DeepSpeed calls."""

    def __getattr__(self, name: str) -> Any:
        older = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        return getattr(parallel_state, older)


def initialize(tp: int) -> ModelParallelUnit:
    """Build Megatron's groups over all ranks, tp innermost as in :class:`ParallelDims`."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return ModelParallelUnit()


class ColumnLinear(ColumnParallelLinear):
    """All tokens to this rank's heads or hidden units; the gather before it sums the input's gradient."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, disable_grad_reduce=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RowLinear(RowParallelLinear):
    """This rank's heads or hidden units to partial sums, which the scatter after it adds up."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, input_is_parallel=True, skip_bias_add=True, **settings)
        self.bias_share = 1 / self.tp_group.size()

    def forward(self, x: Tensor) -> Tensor:
        partial = F.linear(x, self.weight)
        # Each rank adds its share of the bias, so that the sum has it once.
        return partial if self.bias is None else partial + self.bias.to(partial.dtype) * self.bias_share


def apply_megatron(objective: Objective) -> None:
    """Replace the split linears by Megatron's with empty weights; on meta or in ``deepspeed.zero.Init``."""
    group = parallel_state.get_tensor_model_parallel_group()
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        # The device is that of the surrounding context; weights are filled later.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )
    kinds: dict[str, type[nn.Module]] = {"column": ColumnLinear, "row": RowLinear}
    for path, module in list(objective.named_modules()):
        split = split_of(f"{path}.weight")
        if isinstance(module, nn.Linear) and split != "replicated":
            options = {"config": config, "init_method": nn.init.zeros_, "bias": module.bias is not None}
            linear = kinds[split](module.in_features, module.out_features, **options)
            parent, _, name = path.rpartition(".")
            setattr(objective.get_submodule(parent), name, linear)


def install_collectives(objective: Objective) -> TokenShard:
    """Gather and scatter tokens around attention and MLP with the modules that are in place now."""
    shard = TokenShard(parallel_state.get_tensor_model_parallel_group())
    route_tokens(objective, shard)
    return shard


def mark_parameters(objective: Objective, *, sum_in_backward: bool) -> None:
    """Mark split parameters for DeepSpeed's gradient norm.

    ``sum_in_backward`` sums gradients of the others over tp, one by one as they come; else
    :func:`sum_replicated_gradients` must before the update. Needs the final parameter objects: ``to_empty`` makes
    new ones.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in objective.named_parameters():
        dim = split_dim(name)
        if dim is None and sum_in_backward:
            parameter.register_hook(lambda grad: _summed(grad, group))
        elif dim is not None:
            # Megatron's own function refuses a parameter that is marked already, as those of its linears are.
            marks = {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}
            for attribute, value in marks.items():
                setattr(parameter, attribute, value)


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a replicated weight's gradient over tp: each rank has the part of its own tokens or heads."""
    total = grad.clone()
    dist.all_reduce(total, group=group)
    return total


def sum_replicated_gradients(parameters: Iterable[nn.Parameter], grads: Iterable[Tensor]) -> None:
    """Sum the gradients (or a rank's part of each) of replicated parameters over tp, in place, in one all-reduce.

    ``parameters`` and ``grads`` go together; those that :func:`mark_parameters` has marked are left as they are.
    """
    pairs = zip(parameters, grads, strict=True)
    parts = [grad for parameter, grad in pairs if not getattr(parameter, "tensor_model_parallel", False)]
    total = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    torch._foreach_copy_(
        parts, [t.view_as(p) for t, p in zip(total.split([p.numel() for p in parts]), parts, strict=True)]
    )
