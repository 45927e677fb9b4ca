"""Engine over DeepSpeed ZeRO-0/1/2/3, with the same canonical state as FSDP.

DeepSpeed keeps fp32 masters as flat partitions; AdamW's moments and the EMA are three more sets of such
partitions. State is read and written parameter by parameter: a set is swapped into the masters' place, and
DeepSpeed's accessors gather or scatter one parameter at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from deco_scale.distributed.replica_check import Replicas
from deco_scale.errors import ConfigError
from deco_scale.models.stored_names import stored_names, to_stored
from deco_scale.models.tp_plan import split_dim
from deco_scale.objectives import Objective
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.adamw_ema import MOMENTS, AdamWWithEMA, nan_if_nonfinite
from deco_scale.parallel.engines.base import EMA_PREFIX, Engine, EngineSettings, Update
from deco_scale.parallel.engines.deepspeed_config import deepspeed_json, import_deepspeed, import_megatron
from deco_scale.parallel.init_weights import initial_tensors
from deco_scale.parallel.parallelize import parallelize
from deco_scale.parallel.tensor_parallel import tp_part, tp_placement
from deco_scale.precision import fp8

_HELD = -1
"""Number of a module that uses every weight, while weights are held."""


class DeepSpeedEngine(Engine):
    """The objective in a ZeRO engine, with Megatron's linears under tensor parallelism."""

    def __init__(self, build: Callable[[], Objective], settings: EngineSettings) -> None:
        self.settings, self._stage = settings, settings.zero_stage
        self._held = False
        dims, device, stage = settings.dims, settings.device, self._stage
        deepspeed = import_deepspeed(device)
        self._utils = deepspeed.utils
        config = deepspeed_json(settings)
        with torch.device("meta"):
            template = build()
        megatron = import_megatron() if dims.tp > 1 else None
        mpu = megatron.initialize(dims.tp) if megatron else None
        self._megatron = megatron
        # ZeRO-3 has every gradient's own part at hand before an update, unless it offloads them.
        offload = settings.overrides.get("zero_optimization", {}).get("offload_optimizer")
        self._sums_before_update = stage == 3 and not offload
        # An earlier engine of this process may have left its own.
        self._utils.groups.mpu = mpu
        # tp first: a parameter is split over tp, and each part over dp.
        ranks = torch.arange(dist.get_world_size()).view(dims.dp, dims.tp).T
        self._mesh = DeviceMesh(device.type, ranks, mesh_dim_names=("tp", "dp"))
        init_context: AbstractContextManager[Any] = torch.device("meta")
        if stage == 3:
            config_and_mpu = {"config_dict_or_path": config, "mpu": mpu}
            init_context = deepspeed.zero.Init(data_parallel_group=self._mesh.get_group("dp"), **config_and_mpu)
        with init_context:
            objective = build()
            if megatron:
                megatron.apply_megatron(objective)

        def shard(objective: Objective) -> None:
            if stage != 3:
                objective.to_empty(device=device)
                self._fill(objective, template)
            else:
                # A unit's weights are gathered and released at once: one pair of hooks for each unit, not for each
                # module. The decoder needs it as well: it reads its linears' weights without calling the linears.
                self._utils.set_z3_leaf_modules(objective, list({type(unit) for unit in objective.denoiser.units}))
            if megatron:
                megatron.mark_parameters(objective, sum_in_backward=not self._sums_before_update)
            self._optimizer = AdamWWithEMA(objective.parameters(), settings.optimizer, kernels=settings.kernels)
            client = {"optimizer": self._optimizer, "config": config, "mpu": mpu}
            self._engine, *_ = deepspeed.initialize(model=objective, **client)

        parallelize(
            objective,
            fp8_plan=settings.fp8_plan,
            bias_share=dims.tp,
            # PyTorch's checkpointing keeps no gathered weight of a block that it recomputes.
            release_weights=stage == 3
            and settings.reshard_after_forward
            and settings.activation_checkpointing == "none"
            and not settings.compile_blocks,
            activation_checkpointing=settings.activation_checkpointing,
            compiled=objective.denoiser.transformer_blocks if settings.compile_blocks else (),
            compile_fallback=settings.compile_fallback,
            shard=shard,
        )
        # Behind DeepSpeed, which chooses what it communicates in bf16 by the class of a linear.
        self.tokens = megatron.install_collectives(objective) if megatron else None
        self._objective = objective
        self._parameters: dict[str, nn.Parameter] = dict(objective.named_parameters())
        if stage == 3:
            self._fill(objective, template)
            self._refresh()
        masters = self._masters()
        if settings.kernels == "triton" and any(master.device.type != device.type for master in masters.values()):
            raise ConfigError(
                "parallel.deepspeed keeps optimizer state in host memory, which Triton kernels cannot reach; "
                "set kernels: torch"
            )
        self._optimizer.track(masters, ema=masters.keys())

    def _fill(self, objective: nn.Module, template: nn.Module) -> None:
        """Set initial weights, each to this rank's part over tp."""
        parameters = dict(objective.named_parameters())
        for name, tensor in initial_tensors(template, self.settings.seed):
            part = tp_part(name, tensor, self._mesh.get_local_rank("tp"), self.settings.dims.tp)
            if self._stage == 3:
                self._set_full(parameters[name], part.to(self.settings.device))
            else:
                parameters[name].data.copy_(part)

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        self._hold_weights(not last)
        with fp8.fp8_context(self.settings.fp8_plan):
            losses = self._engine(*inputs)
        self._engine.backward(nan_if_nonfinite(losses["loss"] * scale), scale_wrt_gas=False)
        return self._whole(losses)

    def _hold_weights(self, hold: bool) -> None:
        """Let ZeRO-3 release no weight, or again those after use, where weights stay gathered over a step."""
        if self._stage < 3 or self.settings.reshard_after_forward or hold == self._held:
            return
        self._held = hold
        for parameter in self._parameters.values():
            # DeepSpeed releases a weight that no module uses; its own modules have numbers from 0 on.
            users = cast(Any, parameter).ds_active_sub_modules
            if hold:
                users.add(_HELD)
            else:
                users.discard(_HELD)

    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        # DeepSpeed clips and checks itself, except under ZeRO-0, where every rank has all gradients.
        client = self._optimizer
        client.begin(lr=lr, betas=betas, measure_norm=self._stage == 0, should_skip=should_skip)
        if self._megatron is not None and self._sums_before_update:
            zero = self._engine.optimizer
            parameters = chain.from_iterable(zero.fp16_groups)
            grads = chain.from_iterable(zero.averaged_gradients[i] for i in range(len(zero.fp16_groups)))
            self._megatron.sum_replicated_gradients(parameters, grads)
        self._engine.step()
        if self._stage == 0:
            assert client.norm is not None and client.skipped is not None
            norm, skipped = client.norm, client.skipped
        else:
            optimizer, device = self._engine.optimizer, self.settings.device
            norm = torch.as_tensor(optimizer._global_grad_norm, dtype=torch.float32).to(device)
            skipped = torch.full((), float(optimizer.overflow), device=device)
            if should_skip is not None:
                skipped = torch.maximum(skipped, should_skip)
        client.end(skipped)
        return Update(norm, skipped)

    def replicas(self) -> Sequence[Replicas]:
        replicas = []
        # ZeRO-3 keeps small parameters gathered between steps, but only their parts are state.
        weights = {n: getattr(p, "ds_tensor", p).data for n, p in self._parameters.items()}
        if self._stage < 3 and self.settings.dims.dp > 1:
            state = {f"model.{name}": weight for name, weight in weights.items()}
            for kind in ("ema", *MOMENTS) if self._stage == 0 else ():
                state |= {f"{kind}.{name}": value for name, value in self._optimizer.tensors(kind).items()}
            replicas.append(Replicas(self._mesh.get_group("dp"), state))
        if self.settings.dims.tp > 1:
            same = {f"model.{name}": weight for name, weight in weights.items() if split_dim(name) is None}
            replicas.append(Replicas(self._mesh.get_group("tp"), same))
        return replicas

    def state(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for kind in ("model", "ema", *MOMENTS):
            with self._in_masters(kind):
                for name, parameter in self._parameters.items():
                    if kind != "ema" or name.startswith(EMA_PREFIX):
                        for stored, part in to_stored({name: self._get_full(parameter)}).items():
                            state[f"{kind}.{stored}"] = self._shard_over_dp(stored, part)
        return state | fp8.scaling_state(self._objective.denoiser, self.settings.fp8_plan)

    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        for kind in ("ema", *MOMENTS, "model"):
            with self._in_masters(kind, keep=True):
                for name, parameter in self._parameters.items():
                    # Popped, so that each tensor is freed once it is copied.
                    parts = [state.pop(f"{kind}.{stored}", None) for stored in stored_names(name)]
                    fulls = [self._whole_over_dp(part) for part in parts if part is not None]
                    if len(fulls) == len(parts):
                        self._set_full(parameter, torch.cat(fulls) if len(fulls) > 1 else fulls[0])
        self._optimizer.set_steps(optimizer_steps)
        fp8.load_scaling_state(self._objective.denoiser, self.settings.fp8_plan, state)
        self._refresh()

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        try:
            with self._optimizer.swap_ema():
                self._refresh()
                yield
        finally:
            self._refresh()

    def _shard_over_dp(self, name: str, part: Tensor) -> DTensor:
        """A parameter's tp part, full on each dp rank, as a DTensor sharded over both."""
        shape, dim = list(part.shape), split_dim(name)
        if dim is not None:
            shape[dim] *= self.settings.dims.tp
        chunks = part.chunk(self.settings.dims.dp)
        rank = self._mesh.get_local_rank("dp")
        # Cloned, because a view would keep the full parameter alive.
        local = chunks[rank].clone() if rank < len(chunks) else part.new_empty(0, *part.shape[1:])
        placements = [tp_placement(name), Shard(0)]
        layout: dict[str, Any] = {"shape": torch.Size(shape), "stride": torch.empty(shape, device="meta").stride()}
        return DTensor.from_local(local, self._mesh, placements, run_check=False, **layout)

    @staticmethod
    def _whole_over_dp(tensor: Tensor) -> Tensor:
        """Inverse of :meth:`_shard_over_dp`; a collective."""
        assert isinstance(tensor, DTensor)
        return tensor.redistribute(placements=[tensor.placements[0], Replicate()]).to_local()

    def _masters(self) -> dict[str, Tensor]:
        """The fp32 tensors that the optimizer updates: flat partitions, or the parameters under ZeRO-0."""
        if self._stage == 0:
            return dict(self._parameters)
        partitions = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        flats = getattr(self._engine.optimizer, partitions)
        return {f"flat.{i}": flat for i, flat in enumerate(flats)}

    @contextmanager
    def _in_masters(self, kind: str, *, keep: bool = False) -> Iterator[None]:
        """Swap a set of partitions into the masters' place; ``keep`` keeps what was written to it."""
        if kind == "model":
            yield
            return
        masters, partitions = self._masters(), self._optimizer.tensors(kind)
        saved = {name: master.detach().clone() for name, master in masters.items()}
        for name, master in masters.items():
            master.data.copy_(partitions[name])
        try:
            yield
            if keep:
                for name, master in masters.items():
                    partitions[name].copy_(master.data)
        finally:
            for name, master in masters.items():
                master.data.copy_(saved[name])

    def _get_full(self, parameter: nn.Parameter) -> Tensor:
        if self._stage == 0:
            return parameter.detach().clone()
        full = self._utils.safe_get_full_fp32_param(parameter)
        return full.detach().reshape(getattr(parameter, "ds_shape", parameter.shape))

    def _set_full(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self._stage == 0:
            parameter.data.copy_(value)
        elif self._stage == 3:
            # Partitions are equal slices of the flattened parameter, the last one padded.
            size, flat = cast(Any, parameter).ds_tensor.ds_numel, value.float().flatten()
            padded = torch.nn.functional.pad(flat, (0, size * self.settings.dims.dp - flat.numel()))
            part = padded.narrow(0, size * self._mesh.get_local_rank("dp"), size)
            self._utils.safe_set_local_fp32_param(parameter, part)
        else:
            self._utils.safe_set_full_fp32_param(parameter, value.float())

    def _refresh(self) -> None:
        """Update the weights that compute from the masters."""
        if self._stage in (1, 2):
            self._engine.optimizer.update_lp_params()
        if self._stage == 3:
            optimizer = self._engine.optimizer
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = optimizer.persistent_parameters
            if persistent:
                # Small parameters stay gathered between steps; gather them anew.
                persistent[0].partition(persistent)
                persistent[0].all_gather(persistent)
