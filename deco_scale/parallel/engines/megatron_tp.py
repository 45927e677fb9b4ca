"""Tensor parallelism by megatron-core's linears, for the deepspeed engine.

The same plan and the same movement of tokens as in :mod:`deco_scale.parallel.tensor_parallel`; here a weight is its
local slice for good, in a Column- or RowParallelLinear, and ``parallel_state`` tells DeepSpeed who is who.
Megatron's own sequence parallelism wants tokens that divide by tp, tokens as the first dimension and CUDA;
so its collectives are switched off and :class:`TokenShard` gathers and scatters around its linears.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from deco_scale.models.tp_plan import split_dim, split_of
from deco_scale.objectives import Objective
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.parallel.tensor_parallel import route_tokens


class ModelParallelUnit:
    """``parallel_state`` with the three older names that DeepSpeed asks for."""

    def __getattr__(self, name: str) -> Any:
        older = name.replace("get_model_parallel_", "get_tensor_model_parallel_")
        return getattr(parallel_state, older)


def initialize(tp: int) -> ModelParallelUnit:
    """Build Megatron's groups over all ranks, tp innermost as in :class:`ParallelDims`."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, create_gloo_process_groups=False)
    return ModelParallelUnit()


class _ComputeDtype:
    """Casts to autocast's dtype before the linear's own autograd function, whose backward knows only CUDA's."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        device = input.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            input, weight = input.to(dtype), weight.to(dtype)
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


class ColumnLinear(_ComputeDtype, ColumnParallelLinear):
    """All tokens to this rank's heads or hidden units; the input's gradient is summed by the gather before it."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, disable_grad_reduce=True, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(_ComputeDtype, RowParallelLinear):
    """This rank's heads or hidden units to partial sums, which the scatter behind it adds up."""

    def __init__(self, *sizes: int, **settings: Any) -> None:
        super().__init__(*sizes, input_is_parallel=True, skip_bias_add=True, **settings)
        # Megatron's name for "the caller does the communication".
        self.explicit_expert_comm = True

    def forward(self, x: Tensor) -> Tensor:
        partial, bias = super().forward(x)
        # A share of the bias on each rank: the sum has it once.
        return partial if bias is None else partial + bias.to(partial.dtype) / self.tp_group.size()


def apply_megatron(objective: Objective) -> None:
    """Put Megatron's linears in place of the split ones (empty weights).

    Works on the meta device and under ``deepspeed.zero.Init`` as well.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    config = ModelParallelConfig(
        tensor_model_parallel_size=group.size(),
        # The device is that of the surrounding context; weights come later.
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
    )
    kinds: dict[str, type[nn.Module]] = {"column": ColumnLinear, "row": RowLinear}
    for path, module in list(objective.named_modules()):
        split = split_of(f"{path}.weight")
        if isinstance(module, nn.Linear) and split != "replicated":
            linear = kinds[split](
                module.in_features,
                module.out_features,
                config=config,
                init_method=nn.init.zeros_,
                bias=module.bias is not None,
            )
            parent, _, name = path.rpartition(".")
            setattr(objective.get_submodule(parent), name, linear)


def install_collectives(objective: Objective) -> TokenShard:
    """Move tokens around the linears that are in place now."""
    shard = TokenShard(parallel_state.get_tensor_model_parallel_group())
    route_tokens(objective, shard)
    return shard


def mark_parameters(objective: Objective) -> None:
    """Tell DeepSpeed's norm what is split, and sum what is not; once parameters are the final objects."""
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in objective.named_parameters():
        dim = split_dim(name)
        if dim is None:
            parameter.register_hook(lambda grad: _summed(grad, group))
        else:
            # As Megatron's own function, which insists on being the first: its linears may have set them already.
            for attribute, value in (
                ("tensor_model_parallel", True),
                ("partition_dim", dim),
                ("partition_stride", 1),
            ):
                setattr(parameter, attribute, value)


def _summed(grad: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over tp of a replicated weight's gradient: each rank has the part of its own tokens or heads."""
    total = grad.clone()
    dist.all_reduce(total, group=group)
    return total
