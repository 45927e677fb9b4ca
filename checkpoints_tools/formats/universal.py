"""DeepSpeed's universal checkpoints: a folder for each parameter, with full tensors, for any layout.

``<tag>/zero/<parameter>/`` has ``fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``; the tag's
model-states file has the run's progress (``deepspeed/checkpoint/ds_to_universal.py`` of DeepSpeed 0.19).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import Advance, CheckpointReader, TensorSpec
from checkpoints_tools.formats.torch_zip import Archive, StoredTensor
from checkpoints_tools.formats.zero.layout import Shape, full_shape, joined_shapes
from checkpoints_tools.formats.zero.side_file import (
    CARRIED,
    PARAMETERS,
    VERSION,
    DeepSpeedReader,
    open_archive,
    stored_step,
)
from checkpoints_tools.formats.zero.writer import ZeroLayout, adamw_group, model_states, parameter_order
from checkpoints_tools.memory_budget import MemoryBudget, in_threads, sync_files, tensor_budget
from deco_scale.checkpoint.format import CheckpointMeta, without_record_checksums
from deco_scale.checkpoint.integrity import ChecksummedFile
from deco_scale.errors import ConfigError
from deco_scale.models.stored_names import stored_names
from deco_scale.models.tp_plan import split_dim

_SUB_PARAMETERS = "param_n_sub_params"
"""DeepSpeed's key for the number of parts, each of which is split over tensor parallel ranks."""
_STEMS = {"model": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
"""Names of a parameter's files by set."""
_OPTIMIZER = "optimizer_state.pt"


def is_universal(path: Path) -> bool:
    """Whether a folder is a universal checkpoint, or has a ``latest_universal`` file that names one."""
    return (path / "latest_universal").is_file() or (path / "zero" / _OPTIMIZER).is_file()


class UniversalReader(DeepSpeedReader):
    """A universal checkpoint.

    Shapes are compared with those of the inferred model, because conversions with tensor parallelism have joined
    parts along the wrong dimension. Tensors that were stored flat take their shape from the model-states file.
    Raises :class:`ConfigError` naming the file.
    """

    format = "DeepSpeed universal"

    def __init__(self, path: Path) -> None:
        super().__init__(path, "latest_universal")
        shapes: dict[str, Shape] = {}
        self._tp = 1
        for states in self._model_states:
            tp = states.content.get("mp_world_size")
            self._tp = tp if isinstance(tp, int) else 1
            for group in states.groups:
                shapes |= {n: full_shape(n, s, self._tp) for n, s in group.items()}
        self._stored: dict[str, StoredTensor] = {}
        self._steps: dict[int, Path] = {}
        folders = sorted(p for p in (self.path / "zero").iterdir() if p.is_dir())
        for folder in folders:
            self._read_parameter(folder, shapes)
        missing = sorted(set(shapes) - {folder.name for folder in folders})
        if missing:
            raise ConfigError(f"{self.path / 'zero' / missing[0]} is missing, which the model-states file lists")
        self._read_optimizer()
        if len(self._steps) > 1:
            (first, a), (second, b) = sorted(self._steps.items())[:2]
            raise ConfigError(f"{self.path} mixes optimizer steps: {a} has {first}, {b} has {second}")
        self._finish(
            {n: TensorSpec(s.shape, s.dtype) for n, s in self._stored.items()}, next(iter(self._steps), None)
        )

    def _read_own(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        return self._stored[name].read(rows)

    def _read_parameter(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        name = folder.name
        if not name.startswith(PARAMETERS) or name not in shapes:
            raise ConfigError(f"{folder}: unknown parameter")
        files = {kind: folder / f"{stem}.pt" for kind, stem in _STEMS.items()}
        missing = [kind for kind, file in files.items() if not file.is_file()]
        if "model" in missing or len(missing) == 1:
            raise ConfigError(f"{files[missing[0]]} is missing")
        for kind in sorted(files.keys() - missing):
            file = files[kind]
            archive = open_archive(file)
            content = archive.content
            tensor = content.get("param") if isinstance(content, Mapping) else content
            stored = archive.stored(tensor, name)
            if len(stored.shape) == 1 and stored.meta.is_contiguous() and stored.shape[0] == prod(shapes[name]):
                stored = stored.reshaped(shapes[name])
            if stored.shape != shapes[name]:
                raise ConfigError(f"{file}: {name} has shape {stored.shape}, expected {shapes[name]}")
            names = stored_names(name)
            in_order = self._tp == 1 or (isinstance(content, Mapping) and _SUB_PARAMETERS in content)
            if len(names) > 1 and not in_order:
                raise ConfigError(
                    f"{file}: the tensor parallel ranks' parts of {name} are joined in the wrong order; "
                    "convert DeepSpeed's native checkpoint instead (deco-ckpt reshard)"
                )
            for index, part in enumerate(names):
                self._stored[f"{kind}.{part}"] = stored.part(index, len(names)) if len(names) > 1 else stored
        if (folder / "step.pt").is_file():
            archive = open_archive(folder / "step.pt")
            self._note_step(archive, archive.content)

    def _read_optimizer(self) -> None:
        """Note the step that ZeRO-3's conversion stores only in the common file."""
        archive = open_archive(self.path / "zero" / _OPTIMIZER)
        inner = archive.content.get("optimizer_state_dict") if isinstance(archive.content, Mapping) else None
        states = inner.get("state") if isinstance(inner, Mapping) else None
        for state in states.values() if isinstance(states, Mapping) else ():
            self._note_step(archive, state.get("step"))

    def _note_step(self, archive: Archive, value: object) -> None:
        step = stored_step(archive, value)
        if step is not None:
            self._steps.setdefault(step, archive.file)


def write_universal(
    folder: Path, source: CheckpointReader, meta: CheckpointMeta, *, workers: int, memory: int, advance: Advance
) -> None:
    """Write a universal checkpoint into the existing ``folder``; ``memory`` bounds the tensors in memory.

    ``source`` must have moments, without which DeepSpeed does not load a universal checkpoint. The result loads
    under ZeRO-1, 2 and 3 on any number of ranks. A tensor that ZeRO-1/2 splits over tensor parallel ranks records
    the dimension.
    """
    shapes = joined_shapes(parameter_order(source))
    zero = folder / "zero"
    step = torch.tensor(float(meta.optimizer_steps))
    for name in shapes:
        (zero / name).mkdir(parents=True)
        _save(zero / name / "step.pt", step)

    budget = MemoryBudget(tensor_budget(source.specs.values(), memory))

    def save(full: str) -> None:
        kind, _, name = full.partition(".")
        stored = [f"{kind}.{n}" for n in stored_names(name)]
        with budget.reserve(_peak(source, stored)):
            param = torch.empty(shapes[name])
            for target, part in zip(
                param.chunk(len(stored)) if len(stored) > 1 else (param,), stored, strict=True
            ):
                target.copy_(source.read(part))
            content: dict[str, Any] = {"param": param}
            dim = split_dim(name)
            if dim is not None:
                content["cat_dim"] = dim
            if len(stored) > 1:
                content[_SUB_PARAMETERS] = len(stored)
            _save(zero / name / f"{_STEMS[kind]}.pt", content)
            del content, param
        for part in stored:
            advance(part)

    with without_record_checksums():
        in_threads(save, [f"{kind}.{name}" for kind in CARRIED for name in shapes], workers)
    group = adamw_group(meta, [0])
    common = {
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": float((meta.config.get("optimizer") or {}).get("clip_norm", 0.0)),
        "ds_version": VERSION,
        "param_groups": [group],
        # Read by ZeRO-3.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [group]},
    }
    _save(zero / _OPTIMIZER, common)
    single = ZeroLayout(dp=1, tp=1, stage=1)
    content = model_states([OrderedDict(shapes)], meta, single, {})
    for file in (*single.model_files(0), *ZeroLayout(dp=1, tp=1, stage=3).model_files(0)):
        _save(folder / file, content)
    sync_files([*folder.rglob("*.pt"), *(zero / name for name in shapes), zero])


def largest_peak(source: CheckpointReader) -> int:
    """Bytes in memory while the largest parameter is written."""
    parameters = joined_shapes(parameter_order(source))
    return max(_peak(source, [f"model.{n}" for n in stored_names(name)]) for name in parameters)


def _peak(source: CheckpointReader, stored: Sequence[str]) -> int:
    # A parameter in fp32, and one of its stored tensors as read.
    specs = [source.specs[name] for name in stored]
    return sum(4 * spec.numel for spec in specs) + max(spec.nbytes for spec in specs)


def _save(file: Path, content: object) -> None:
    with ChecksummedFile(file) as out:
        torch.save(content, out)  # type: ignore[arg-type]
