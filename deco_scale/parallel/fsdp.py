"""FSDP2 and HSDP, with tensor and sequence parallelism inside.

Every parameter, gradient, moment and average is sharded over ``dp_shard``, linears of blocks over ``tp`` too.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from deco_scale.objectives import Objective
from deco_scale.parallel.initial import initial_tensors
from deco_scale.parallel.layout import ActivationCheckpointing, Layout
from deco_scale.parallel.recompute import apply_recompute
from deco_scale.parallel.sequence import TokenShard
from deco_scale.parallel.tensor import apply_tensor_parallel, tp_part
from deco_scale.precision import PrecisionConfig, autocast
from deco_scale.training.batch import ObjectiveInputs
from deco_scale.training.engine import AVERAGED, TokenGroup, Update
from deco_scale.training.optimizer import AveragedAdamW, poisoned
from deco_scale.training.settings import OptimizerConfig


def shard(objective: Objective, *, mesh: DeviceMesh, precision: PrecisionConfig, compile_blocks: bool) -> None:
    """Apply per-block compile and FSDP2 to a finished objective, block by block, then the rest."""
    policy = MixedPrecisionPolicy()
    if precision.compute == "bf16":
        # Weights travel in bf16, gradients are reduced in fp32; autocast decides what computes in what.
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    denoiser = objective.denoiser
    units = list(denoiser.transformer_blocks)
    if denoiser.decoder is not None:
        units.append(denoiser.decoder)
    for unit in units:
        if compile_blocks:
            unit.compile()
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    fully_shard(objective, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(objective, "predict")


class FsdpEngine:
    """Engine over FSDP2; see :class:`deco_scale.training.engine.Engine`."""

    def __init__(
        self,
        build: Callable[[], Objective],
        *,
        layout: Layout,
        device: torch.device,
        optimizer: OptimizerConfig,
        precision: PrecisionConfig,
        compile_blocks: bool,
        recompute: ActivationCheckpointing,
        seed: int,
    ) -> None:
        self._device, self._precision, self._layout = device, precision, layout
        with torch.device("meta"):
            template, self._objective = build(), build()
        mesh = init_device_mesh(
            device.type,
            (layout.dp_replicate, layout.dp_shard, layout.tp),
            mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
        )
        self._tokens: TokenShard | None = None
        if layout.tp > 1:
            self._tokens = apply_tensor_parallel(self._objective, mesh["tp"], compile_blocks=compile_blocks)
            # Lets the gradient norm be reduced over both axes at once.
            mesh["dp_shard", "tp"]._flatten()
        apply_recompute(self._objective.denoiser.transformer_blocks, recompute)
        shard(
            self._objective,
            mesh=mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"],
            precision=precision,
            # With tp, blocks are compiled inside of what shows them their local weights.
            compile_blocks=compile_blocks and layout.tp == 1,
        )
        self._objective.to_empty(device=device)
        self._parameters = {n: cast(DTensor, p) for n, p in self._objective.named_parameters()}
        for name, tensor in initial_tensors(template, seed):
            target = self._parameters[name]
            part = tp_part(name, tensor, mesh.get_local_rank("tp"), layout.tp)
            # FSDP cuts what tp leaves along dimension 0, in chunks of equal size but for the last ones.
            chunks = part.chunk(layout.dp_shard)
            place = mesh.get_local_rank("dp_shard")
            if place < len(chunks):
                _local(target).copy_(chunks[place])
        shards = {n: _local(p) for n, p in self._parameters.items()}
        self._optimizer = AveragedAdamW(shards, optimizer, averaged=[n for n in shards if n.startswith(AVERAGED)])

    @property
    def tokens(self) -> TokenGroup | None:
        return self._tokens

    @property
    def optimizer_steps(self) -> int:
        return self._optimizer.steps

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        cast(FSDPModule, self._objective).set_requires_gradient_sync(last)
        with autocast(self._precision, self._device):
            losses = self._objective(*inputs)
        poisoned(losses["loss"] * scale).backward()
        # A tp rank has its part of a loss; the mean over all ranks wants tp times that.
        return {name: value.detach() * self._layout.tp for name, value in losses.items()}

    def update(self, *, lr: float, betas: tuple[float, float]) -> Update:
        grads = {n: cast(DTensor, p.grad) for n, p in self._parameters.items() if p.grad is not None}
        norm = cast(DTensor, nn.utils.get_total_norm(grads.values())).full_tensor()
        skipped = self._optimizer.step({n: g.to_local() for n, g in grads.items()}, norm, lr=lr, betas=betas)
        for parameter in self._parameters.values():
            parameter.grad = None
        return Update(norm, skipped)

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {f"model.{n}": p.detach() for n, p in self._parameters.items()}
        for kind, tensors in self._optimizer.tensors().items():
            for name, local in tensors.items():
                like = self._parameters[name]
                state[f"{kind}.{name}"] = DTensor.from_local(
                    local,
                    like.device_mesh,
                    like.placements,
                    run_check=False,
                    shape=like.shape,
                    stride=like.stride(),
                )
        return state

    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        # The tensors of state() are the live ones, already filled in place.
        self._optimizer.set_steps(optimizer_steps)

    def averaged(self) -> AbstractContextManager[None]:
        return self._optimizer.swapped()

    @torch.no_grad()
    def predict(self, patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        with autocast(self._precision, self._device):
            prediction = self._objective.predict(patches, t, condition, grid)
        # The root's weights stay gathered after a forward pass; they may be the averaged ones.
        cast(FSDPModule, self._objective).reshard()
        return self._tokens.gather(prediction, patches.shape[1]) if self._tokens else prediction


def _local(tensor: DTensor) -> Tensor:
    """This rank's part, sharing storage."""
    return cast(DTensor, tensor.detach()).to_local()
