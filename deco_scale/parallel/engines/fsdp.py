"""Engine over FSDP2 (HSDP with ``dp_replicate``), combined with tensor and sequence parallelism.

Parameters, gradients, moments and EMA are sharded over ``dp_shard``; linears of blocks over ``tp`` as well. One
process alone has nothing to shard: the plain objective computes, without FSDP's hooks and copies.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Placement, Shard

from deco_scale.distributed.replica_check import Replicas
from deco_scale.models import Denoiser
from deco_scale.models.stored_names import stored_names
from deco_scale.models.tp_plan import split_dim
from deco_scale.objectives import Objective
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.adamw_ema import MOMENTS, AdamWWithEMA, nan_if_nonfinite
from deco_scale.parallel.config import BLOCKS_GATHERED
from deco_scale.parallel.engines.base import EMA_PREFIX, Engine, EngineSettings, Update
from deco_scale.parallel.init_weights import initial_tensors
from deco_scale.parallel.parallelize import parallelize
from deco_scale.parallel.tensor_parallel import apply_tensor_parallel, show_local_weights, tp_part
from deco_scale.precision import fp8
from deco_scale.precision.config import autocast


def shard_units(denoiser: Denoiser, *, reshard_after_forward: bool) -> list[list[nn.Module]]:
    """What is gathered together: a transformer block or the decoder, or :data:`BLOCKS_GATHERED` blocks.

    Larger units cost the host less. Weights that stay gathered take no more memory in them; gradients do, until
    they are reduced.
    """
    size = 1 if reshard_after_forward else BLOCKS_GATHERED
    units = [
        list(blocks[first : first + size])
        for blocks in (denoiser.text_blocks, denoiser.blocks)
        for first in range(0, len(blocks), size)
    ]
    return units if denoiser.decoder is None else [*units, [denoiser.decoder]]


def shard(objective: Objective, *, mesh: DeviceMesh, settings: EngineSettings) -> None:
    """Apply FSDP2 to each of :func:`shard_units`, then to the rest."""
    # Weights are gathered in bf16; autocast chooses the compute dtypes.
    policy = MixedPrecisionPolicy(
        param_dtype=None if settings.precision.compute == "fp32" else torch.bfloat16,
        reduce_dtype=torch.bfloat16 if settings.reduce_dtype == "bf16" else torch.float32,
        cast_forward_inputs=False,
    )
    units = shard_units(objective.denoiser, reshard_after_forward=settings.reshard_after_forward)
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=settings.reshard_after_forward)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    # The next unit's weights arrive while this one is dispatched; in backward FSDP does so by itself.
    for current, following in pairwise(units):
        cast(FSDPModule, current[0]).set_modules_to_forward_prefetch([cast(FSDPModule, following[0])])
    register_fsdp_forward_method(objective, "predict")


class FsdpEngine(Engine):
    """The objective in FSDP2 units."""

    def __init__(self, build: Callable[[], Objective], settings: EngineSettings) -> None:
        self.settings = settings
        dims, device = settings.dims, settings.device
        with torch.device("meta"):
            template, self._objective = build(), build()
        mesh = init_device_mesh(
            device.type,
            (dims.dp_replicate, dims.dp_shard, dims.tp),
            mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
        )
        self.tokens = parallelize(
            self._objective,
            fp8_plan=settings.fp8_plan,
            tensor_parallel=partial(apply_tensor_parallel, mesh=mesh["tp"]) if dims.tp > 1 else None,
            show_local_weights=show_local_weights if dims.tp > 1 else None,
            activation_checkpointing=settings.activation_checkpointing,
            compiled=self._objective.denoiser.units if settings.compile_blocks else (),
            compile_fallback=settings.compile_fallback,
            shard=partial(
                shard,
                mesh=mesh["dp_replicate", "dp_shard"] if dims.dp_replicate > 1 else mesh["dp_shard"],
                settings=settings,
            )
            if dims.dp * dims.tp > 1
            else None,
        )
        self._objective.to_empty(device=device)
        self._parameters = dict(self._objective.named_parameters())
        self._mesh = mesh
        for name, tensor in initial_tensors(template, settings.seed):
            part = tp_part(name, tensor, mesh.get_local_rank("tp"), dims.tp)
            _local(self._parameters[name]).copy_(self._own_rows(part))
        self._tp_sharded = {name for name in self._parameters if dims.tp > 1 and split_dim(name) is not None}
        self._shards = {n: _local(p) for n, p in self._parameters.items()}
        self._optimizer = AdamWWithEMA(self._shards.values(), settings.optimizer, kernels=settings.kernels)
        self._optimizer.track(self._shards, ema={n for n in self._shards if n.startswith(EMA_PREFIX)})

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        settings = self.settings
        if isinstance(self._objective, FSDPModule):
            self._objective.set_requires_gradient_sync(last)
            # Weights that stay gathered after forward do so until the update.
            self._objective.set_reshard_after_backward(last or settings.reshard_after_forward)
        with autocast(settings.precision, settings.device), fp8.fp8_context(settings.fp8_plan):
            losses = self._objective(*inputs)
        nan_if_nonfinite(losses["loss"] * scale).backward()
        return self._whole(losses)

    @torch.no_grad()
    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        grads: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                grads[name] = self._shards[name].grad = _local(parameter.grad)
                parameter.grad = None
        norm = self._norm(grads)
        self._optimizer.begin(lr=lr, betas=betas, norm=norm, should_skip=should_skip)
        self._optimizer.step()
        for local in self._shards.values():
            local.grad = None
        assert self._optimizer.skipped is not None
        self._optimizer.end(self._optimizer.skipped)
        return Update(norm, self._optimizer.skipped)

    def replicas(self) -> Sequence[Replicas]:
        state = {f"model.{name}": local for name, local in self._shards.items()}
        for kind in ("ema", *MOMENTS):
            state |= {f"{kind}.{name}": local for name, local in self._optimizer.tensors(kind).items()}
        replicas = []
        if self.settings.dims.dp_replicate > 1:
            replicas.append(Replicas(self._mesh.get_group("dp_replicate"), state))
        if self.settings.dims.tp > 1:
            same = {key: local for key, local in state.items() if key.partition(".")[2] not in self._tp_sharded}
            replicas.append(Replicas(self._mesh.get_group("tp"), same))
        return replicas

    def _norm(self, grads: Mapping[str, Tensor]) -> Tensor:
        """Global gradient norm (0-dim) from local parts; gradients that tp ranks replicate count once.

        ``torch.nn.utils.get_total_norm`` would dispatch DTensor operations for each parameter.
        """
        squares = torch.zeros(2, device=self.settings.device)
        for i, replicated in enumerate((False, True)):
            part = [g for n, g in grads.items() if (n not in self._tp_sharded) == replicated and g.numel()]
            if part:
                squares[i] = torch.stack(torch._foreach_norm(part)).square().sum()
        dist.all_reduce(squares, group=self._mesh.get_group("dp_shard"))
        if self.settings.dims.tp > 1:
            dist.all_reduce(squares[:1], group=self._mesh.get_group("tp"))
        return squares.sum().sqrt()

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for kind, tensors in self._tensors():
            for name, local in tensors.items():
                like, names = self._parameters[name], stored_names(name)
                mesh, placements = self._mesh["dp_shard"], cast(Sequence[Placement], [Shard(0)])
                if isinstance(like, DTensor):
                    mesh, placements = like.device_mesh, like.placements
                shape = torch.Size((like.shape[0] // len(names), *like.shape[1:]))
                layout: dict[str, Any] = {"shape": shape, "stride": like.stride()}
                for stored, part in zip(names, self._parts(name, local), strict=True):
                    state[f"{kind}.{stored}"] = DTensor.from_local(
                        part, mesh, placements, run_check=False, **layout
                    )
        return state | fp8.scaling_state(self._objective.denoiser, self.settings.fp8_plan)

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        # Tensors of state() are live, already filled in place, except for copied parts.
        for kind, tensors in self._tensors() if self.settings.dims.dp_shard > 1 else ():
            for name, local in tensors.items():
                parts = [state[key] for stored in stored_names(name) if (key := f"{kind}.{stored}") in state]
                if len(parts) > 1:
                    wholes = [self._all_rows(name, _local(cast(DTensor, p)), len(parts)) for p in parts]
                    local.copy_(self._own_rows(torch.cat(wholes)))
        fp8.load_scaling_state(self._objective.denoiser, self.settings.fp8_plan, state)
        self._optimizer.set_steps(optimizer_steps)

    def _tensors(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Live local shards by parameter, for each kind of state."""
        yield "model", self._shards
        for kind in ("ema", *MOMENTS):
            yield kind, self._optimizer.tensors(kind)

    def _parts(self, name: str, local: Tensor) -> Sequence[Tensor]:
        """This rank's rows of each stored tensor of a parameter.

        Live where they lie in this rank's shard; of several parts sharded over dp they do not, and are copies.
        """
        count = len(stored_names(name))
        if count == 1 or self.settings.dims.dp_shard == 1:
            return local.chunk(count)
        return [self._own_rows(part).clone() for part in self._all_rows(name, local, 1).chunk(count)]

    def _own_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows, as FSDP shards dimension 0: the last ranks may have less, or nothing."""
        rank, chunks = self._mesh.get_local_rank("dp_shard"), whole.chunk(self.settings.dims.dp_shard)
        return chunks[rank] if rank < len(chunks) else whole[:0]

    def _all_rows(self, name: str, own: Tensor, parts: int) -> Tensor:
        """Inverse of :meth:`_own_rows` for a parameter, or for one of its ``parts``; a collective."""
        like = self._parameters[name]
        rows = like.shape[0] // parts // (self.settings.dims.tp if name in self._tp_sharded else 1)
        layout: dict[str, Any] = {"shape": torch.Size((rows, *like.shape[1:])), "stride": like.stride()}
        return DTensor.from_local(own, self._mesh["dp_shard"], [Shard(0)], run_check=False, **layout).full_tensor()

    def ema_weights(self) -> AbstractContextManager[None]:
        return self._optimizer.swap_ema()

    @torch.no_grad()
    def predict(self, patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        prediction = super().predict(patches, t, condition, grid)
        # Weights that stay gathered after a forward pass may be those of the EMA.
        for module in (self._objective, *self._objective.denoiser.units):
            if isinstance(module, FSDPModule):
                module.reshard()
        return prediction


def _local(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage."""
    # In this order: a DTensor's own detach() goes through its dispatcher.
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
