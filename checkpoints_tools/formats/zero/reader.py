"""Reading a folder of DeepSpeed's ``save_checkpoint`` under ZeRO-1, 2 or 3, tensor by tensor."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import TensorSpec
from checkpoints_tools.formats.torch_zip import Archive, StoredTensor
from checkpoints_tools.formats.zero.layout import Partitions, Shape, full_shape, overlaps, partitions
from checkpoints_tools.formats.zero.side_file import (
    OPTIM,
    DeepSpeedReader,
    entry,
    open_archive,
    ranks_of,
    stored_step,
)
from deco_scale.errors import ConfigError
from deco_scale.models.stored_names import part_of, stored_names
from deco_scale.models.tp_plan import split_dim

_KINDS = ("exp_avg", "exp_avg_sq", "ema")


def is_zero(path: Path) -> bool:
    """Whether a folder has DeepSpeed's optimizer partitions, or a ``latest`` file that names such a folder."""
    return (path / "latest").is_file() or any(OPTIM.fullmatch(f.name) for f in path.glob("*optim_states.pt"))


@dataclass(frozen=True, slots=True)
class OptimContent:
    """The tensors of an optimizer file, by set (``model`` for the masters) and group, and each group's step."""

    tensors: dict[str, list[Any]]
    steps: list[Any]
    stage: int


def optim_content(archive: Archive) -> OptimContent:
    """Find masters and optimizer state in the header of an optimizer file, one entry per group."""
    file = archive.file
    inner = entry(archive.content, "optimizer_state_dict", file)
    stage = entry(inner, "zero_stage", file)
    if not isinstance(stage, int) or stage not in (1, 2, 3):
        raise ConfigError(f"{file} is of ZeRO stage {stage!r}; 1, 2 and 3 are supported")
    masters = entry(inner, "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups", file)
    base = entry(inner, "optimizer_state_dict" if stage == 3 else "base_optimizer_state", file)
    if isinstance(base, list):
        states = dict(enumerate(base))
    else:
        states = entry(base, "state", file)
        listed = entry(base, "param_groups", file)
        if not isinstance(listed, list) or not isinstance(states, Mapping):
            raise ConfigError(f"{file}: the optimizer's state is not one that PyTorch's optimizers save")
        steps = [group.get("step") for group in listed if isinstance(group, Mapping)]
        if any(step is not None for step in steps):
            # Fused optimizers count in the group.
            states = {i: {"step": steps[min(i, len(steps) - 1)], **state} for i, state in states.items()}
    if not isinstance(masters, list) or not all(isinstance(s, Mapping) for s in states.values()):
        raise ConfigError(f"{file}: masters or optimizer state are not lists by group")
    paddings = inner.get("param_alignment_paddings")
    if paddings and not all(isinstance(group, list) and not any(group) for group in paddings):
        raise ConfigError(f"{file} was saved with zero_optimization.parameter_alignment, which is not supported")
    missing = [i for i in range(len(masters)) if states and i not in states]
    if missing:
        raise ConfigError(f"{file} has no optimizer state of group {missing[0]}")
    by_group = [states.get(i, {}) for i in range(len(masters))]
    kinds = [kind for kind in _KINDS if by_group and all(kind in state for state in by_group)]
    if kinds and not {"exp_avg", "exp_avg_sq"} <= set(kinds):
        raise ConfigError(f"{file} has only {kinds} of Adam's moments")
    tensors = {"model": masters} | {kind: [state[kind] for state in by_group] for kind in kinds}
    return OptimContent(tensors, [state.get("step") for state in by_group], int(stage))


class ZeroReader(DeepSpeedReader):
    """DeepSpeed's partitions as full tensors.

    Weights are the fp32 masters. With tensor parallelism, parameters that every tp rank holds in full are read
    from the first. Raises :class:`ConfigError` for missing files, files of different steps and wrong sizes.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "latest")
        grid = _grid(self.path)
        self.tp, self.dp = len(grid), len(grid[0])
        shapes = self._shapes()
        self._flats: dict[tuple[int, int], dict[str, list[StoredTensor]]] = {}
        self._stage = 0
        steps = {self._read_optim(file, tp, dp) for tp, files in enumerate(grid) for dp, file in enumerate(files)}
        if len(steps) != 1:
            raise ConfigError(f"{self.path} mixes optimizer files of steps {sorted(map(str, steps))}")
        self.format = f"DeepSpeed ZeRO-{self._stage}"
        self._parts: list[Partitions] = [partitions(s, dp=self.dp, stage=self._stage) for s in shapes]
        self._local: list[dict[str, Shape]] = [{n: s for g in groups for n, s in g.items()} for groups in shapes]
        self._check_sizes()
        self._finish(self._specs(), next(iter(steps)))
        self.facts |= {"data parallel": self.dp, "tensor parallel": self.tp}

    def _read_own(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        kind, _, stored = name.partition(".")
        parameter, index, count = stored_in(stored, self._local[0])
        dim = split_dim(parameter) if self.tp > 1 else None
        shape = self.specs[name].shape
        first, end = rows if rows is not None else (0, shape[0] if shape else 1)
        out = torch.empty((end - first, *shape[1:]), dtype=self.specs[name].dtype)
        if dim == 1:
            for tp, columns in enumerate(out.chunk(self.tp, dim=1)):
                part = torch.empty(columns.shape, dtype=out.dtype)
                self._fill(part, kind, parameter, tp, first)
                columns.copy_(part)
        else:
            height = self._local[0][parameter][0] // count if shape else 1
            for tp in range(1 if dim is None else self.tp):
                start, stop = max(first, tp * height), min(end, (tp + 1) * height)
                if start < stop:
                    row = index * height + start - tp * height
                    self._fill(out[start - first : stop - first], kind, parameter, tp, row)
        return out if shape else out.view(())

    def _fill(self, out: Tensor, kind: str, name: str, tp: int, row: int) -> None:
        """Fill ``out`` with a tp rank's rows of a parameter from ``row`` on."""
        flat, done = out.view(-1), 0
        first = row * TensorSpec(out.shape[1:]).numel
        for extent in overlaps(self._parts[tp].extents[name], first, flat.numel()):
            stored = self._flats[tp, extent.rank][kind][extent.group]
            stored.read_into(flat[done : done + extent.count], extent.start)
            done += extent.count

    def _shapes(self) -> list[list[dict[str, Shape]]]:
        """Check all model-states files against each other; the groups' shapes by tp rank."""
        shapes: dict[int, list[dict[str, Shape]]] = {}
        sizes: set[tuple[int, int]] = set()
        for states in self._model_states:
            file = states.file
            if shapes.setdefault(states.tp, states.groups) != states.groups:
                raise ConfigError(f"{file} lists other parameters than another file of the same mp_rank")
            world_sizes = [entry(states.content, key, file) for key in ("dp_world_size", "mp_world_size")]
            if not all(isinstance(size, int) for size in world_sizes):
                raise ConfigError(f"{file}: dp_world_size and mp_world_size are {world_sizes}")
            sizes.add((world_sizes[0], world_sizes[1]))
        if sizes != {(self.dp, self.tp)}:
            raise ConfigError(
                f"{self.path} has optimizer files of {self.dp} data parallel x {self.tp} tensor parallel ranks, "
                f"but (dp_world_size, mp_world_size) of the model files: {sorted(sizes)}"
            )
        ranks = {(states.tp, states.dp) for states in self._model_states}
        by_rank = any(dp is not None for _, dp in ranks)
        for tp in range(self.tp):
            for dp in range(self.dp) if by_rank else (None,):
                if (tp, dp) not in ranks:
                    of = f"rank {dp}, " if by_rank else ""
                    raise ConfigError(f"{self.path}: the model_states.pt file of {of}mp_rank {tp} is missing")
        return [shapes[tp] for tp in range(self.tp)]

    def _read_optim(self, file: Path, tp: int, dp: int) -> int | None:
        """Record the positions of an optimizer file's tensors; returns its number of optimizer steps, if any."""
        archive = open_archive(file)
        optim = optim_content(archive)
        if self._stage not in (0, optim.stage):
            raise ConfigError(f"{file} is of ZeRO stage {optim.stage}, another file of stage {self._stage}")
        self._stage = optim.stage
        flats = self._flats[tp, dp] = {
            kind: [archive.stored(tensor, f"{kind} of group {i}") for i, tensor in enumerate(tensors)]
            for kind, tensors in optim.tensors.items()
        }
        if flats.keys() != self._flats[0, 0].keys():
            raise ConfigError(f"{file} has the tensors {list(flats)}, another file {list(self._flats[0, 0])}")
        steps = {stored_step(archive, step) for step in optim.steps}
        if len(steps) > 1:
            raise ConfigError(f"{file}: its groups are of optimizer steps {sorted(map(str, steps))}")
        return next(iter(steps), None)

    def _check_sizes(self) -> None:
        """Each flat buffer must have the size that the parameters' shapes give it, and the type of the others."""
        for (tp, dp), flats in self._flats.items():
            parts = self._parts[tp]
            if len(flats["model"]) != len(parts.sizes):
                raise ConfigError(
                    f"{self.path}: rank {dp} of mp_rank {tp} has {len(flats['model'])} groups, "
                    f"the model file lists {len(parts.sizes)}"
                )
            for group, allowed in enumerate(zip(parts.sizes, parts.used[dp], strict=True)):
                for kind in flats:
                    flat, first = flats[kind][group], self._flats[0, 0][kind][0]
                    if flat.dtype != first.dtype:
                        raise ConfigError(f"{flat.file} holds {flat.dtype} where {first.file} holds {first.dtype}")
                    if len(flat.shape) != 1 or flat.shape[0] not in allowed or not flat.meta.is_contiguous():
                        raise ConfigError(
                            f"{flat.file}: a flat buffer of group {group} has shape {flat.shape}, "
                            f"expected {' or '.join(map(str, sorted(set(allowed))))} elements"
                        )

    def _specs(self) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        for name, part in self._local[0].items():
            if any(local.get(name) != part for local in self._local):
                raise ConfigError(f"{self.path}: {name} has different shapes on different mp_ranks")
            for kind, flats in self._flats[0, 0].items():
                if kind != "ema" or name.startswith("denoiser."):
                    specs |= part_specs(kind, name, full_shape(name, part, self.tp), flats[0].dtype)
        return specs


def part_specs(kind: str, parameter: str, shape: Shape, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """The stored tensors of one of the module's parameters, by canonical name."""
    names = stored_names(parameter)
    if len(names) > 1:
        shape = (shape[0] // len(names), *shape[1:])
    return {f"{kind}.{name}": TensorSpec(shape, dtype) for name in names}


def stored_in(name: str, parameters: Container[str]) -> tuple[str, int, int]:
    """As :func:`part_of`; files of older versions have a parameter for each stored tensor."""
    return (name, 0, 1) if name in parameters else part_of(name)


def _grid(folder: Path) -> list[list[Path]]:
    """Optimizer files by mp_rank and then data parallel rank; none may be missing."""
    files: dict[tuple[int, int], Path] = {}
    for file in sorted(folder.glob("*optim_states.pt")):
        tp, dp = ranks_of(OPTIM, file)
        first = files.setdefault((tp, dp or 0), file)
        if first != file:
            raise ConfigError(f"{file} and {first.name} are of the same rank: two checkpoints are mixed")
    if not files:
        raise ConfigError(f"{folder} has no *_optim_states.pt file of ZeRO")
    tps, dps = max(tp for tp, _ in files) + 1, max(dp for _, dp in files) + 1
    if tps * dps > 10 * len(files):
        raise ConfigError(f"{folder} has {len(files)} optimizer files for {tps * dps} ranks")
    for tp in range(tps):
        for dp in range(dps):
            if (tp, dp) not in files:
                raise ConfigError(f"{folder}: the optimizer file of rank {dp}, mp_rank {tp} is missing")
    return [[files[tp, dp] for dp in range(dps)] for tp in range(tps)]
