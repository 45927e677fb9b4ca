"""Copies of a rank's shards in host memory: the only part of a save that a training step waits for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """This rank's parts of the state at one step, valid until the next one is staged.

    ``tensors`` are plain CPU tensors by canonical name, ``plan`` gives the position of each in its full tensor,
    and ``counted`` names those that this rank, of all that have a copy, counts in the digest.
    """

    tensors: dict[str, Tensor]
    plan: SavePlan
    counted: frozenset[str]


class Stager:
    """Host buffers (pinned where there is a GPU) that are reused from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._plans: list[tuple[Any, SavePlan]] = []

    def stage(self, state: Mapping[str, Tensor], *, prefix: str = "") -> Snapshot:
        """Copy this rank's part of each tensor whose name starts with ``prefix``; waits for the device's copies.

        Nothing is gathered. A plan is reused if names, shapes and placements are those of one of the last two.
        """
        selected = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
        tensors: dict[str, Tensor] = {}
        devices = set()
        for name, tensor in selected.items():
            local = local_part(tensor)
            buffer = self._buffers.get(name)
            if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                self._buffers[name] = buffer
            buffer.copy_(local, non_blocking=local.is_cuda)
            tensors[name] = buffer
            if local.is_cuda:
                devices.add(local.device)
        layout = [(name, _layout(tensor)) for name, tensor in selected.items()]
        plan = next((plan for known, plan in self._plans if known == layout), None)
        if plan is None:
            plan = create_default_local_save_plan(selected, dist.get_rank() == 0)
            self._plans = [*self._plans[-1:], (layout, plan)]
        counted = frozenset(name for name, tensor in selected.items() if is_counted(tensor))
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return Snapshot(tensors=tensors, plan=plan, counted=counted)


class StagedPlanner(DefaultSavePlanner):
    """Saves a snapshot by the plan that was made with it."""

    def __init__(self, snapshot: Snapshot) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._snapshot = snapshot

    def create_local_plan(self) -> SavePlan:
        self.plan = self._snapshot.plan
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self._snapshot.tensors[index.fqn]


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_counted(tensor: Tensor) -> bool:
    """Whether this rank's part of a tensor is counted; of ranks with the same part exactly one is."""
    if not isinstance(tensor, DTensor):
        return dist.get_rank() == 0
    coordinate = list(tensor.device_mesh.get_coordinate() or ())
    copies = [c for c, p in zip(coordinate, tensor.placements, strict=True) if p == Replicate()]
    # HSDP's placements name the shard axis only, its mesh has both: count the first replica.
    return not any(copies)


def _layout(tensor: Tensor) -> Any:
    if isinstance(tensor, DTensor):
        return tuple(tensor.shape), tensor.placements, tensor.device_mesh
    return tuple(tensor.shape)
