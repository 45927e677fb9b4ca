"""DeepSpeed's universal checkpoints: a folder for each parameter, with whole tensors, whatever the layout.

``<tag>/zero/<parameter>/`` has ``fp32.pt``, ``exp_avg.pt``, ``exp_avg_sq.pt`` and ``step.pt``; the tag's
model-states file says where the run stood (``deepspeed/checkpoint/ds_to_universal.py`` of DeepSpeed 0.19).
"""

from collections import OrderedDict
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import Advance, CheckpointReader, TensorSpec
from checkpoints_tools.formats.torch_zip import StoredTensor
from checkpoints_tools.formats.zero.layout import Shape, whole_shape
from checkpoints_tools.formats.zero.side_file import (
    CARRIED,
    MODEL_STATES,
    PARAMETERS,
    VERSION,
    Progress,
    check_sets,
    model_progress,
    open_archive,
    parameter_shapes,
    read_side,
    reshaped,
    resolve_tag,
    stored_number,
)
from checkpoints_tools.formats.zero.writer import ZeroLayout, adamw_group, model_states, parameter_order
from checkpoints_tools.memory_budget import SYNC_THREADS, Budget, held_bytes, in_threads, tensor_budget
from data_pipeline.storage.files import make_durable
from deco_scale.checkpoint.format import CheckpointMeta, ChecksummedFile, without_record_sums
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import split_dim

_FILES = {"fp32": "model", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_OPTIMIZER = "optimizer_state.pt"


def is_universal(path: Path) -> bool:
    """Whether a folder is, or points by its ``latest_universal`` to, a universal checkpoint."""
    return (path / "latest_universal").is_file() or (path / "zero" / _OPTIMIZER).is_file()


class UniversalReader:
    """A universal checkpoint; implements :class:`checkpoints_tools.base.CheckpointReader`.

    Shapes are compared with those of the model that the names describe, because conversions with tensor
    parallelism have put parts together along the wrong dimension. Tensors that were stored flat take the shape
    that the model-states file says. Raises :class:`ConfigError` naming the file.
    """

    meta = None
    format = "DeepSpeed universal"

    def __init__(self, path: Path) -> None:
        self.path = resolve_tag(path, "latest_universal")
        step, skipped, samples, shapes = self._read_model_states()
        self._stored: dict[str, StoredTensor] = {}
        steps: dict[int, Path] = {}
        folders = sorted(p for p in (self.path / "zero").iterdir() if p.is_dir())
        for folder in folders:
            self._read_parameter(folder, shapes, steps)
        missing = sorted(set(shapes) - {folder.name for folder in folders})
        if missing:
            raise ConfigError(f"{self.path / 'zero' / missing[0]} is missing, which the model-states file lists")
        self._read_optimizer(steps)
        if len(steps) > 1:
            (one, a), (other, b) = sorted(steps.items())[:2]
            raise ConfigError(f"{self.path} mixes optimizer steps: {a} says {one}, {b} says {other}")
        self.progress = Progress(step, next(iter(steps), step - skipped), samples)
        self._side, self.side_meta = read_side(self.path, step)
        specs = {n: TensorSpec(s.shape, s.dtype) for n, s in self._stored.items()}
        self.specs = dict(sorted((specs | (self._side.specs if self._side is not None else {})).items()))
        self.model = check_sets(self.specs, self.path)

    @property
    def facts(self) -> Mapping[str, Any]:
        return {"step": self.progress.step}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        if self._side is not None and name in self._side.specs:
            return self._side.read(name, rows)
        return self._stored[name].read(rows)

    def _read_model_states(self) -> tuple[int, int, int, dict[str, Shape]]:
        """Steps, skipped steps, samples, and whole shapes by parameter."""
        said: dict[tuple[int, int, int], Path] = {}
        shapes: dict[str, Shape] = {}
        for file in sorted(self.path.glob("*model_states.pt")):
            if MODEL_STATES.fullmatch(file.name) is None:
                raise ConfigError(f"{file} is a file of pipeline or expert parallelism, which is not supported")
            content = open_archive(file).content
            said[model_progress(content, file)] = file
            tp = content.get("mp_world_size")
            for group in parameter_shapes(content, file):
                shapes |= {n: whole_shape(n, s, tp if isinstance(tp, int) else 1) for n, s in group.items()}
        if not said:
            raise ConfigError(f"{self.path} has no *_model_states.pt file, which says where the run stood")
        if len(said) > 1:
            (one, a), (other, b) = sorted(said.items())[:2]
            raise ConfigError(
                f"{self.path} mixes steps: {a.name} is of step {one[0]}, {b.name} of step {other[0]}"
            )
        return *next(iter(said)), shapes

    def _read_parameter(self, folder: Path, shapes: Mapping[str, Shape], steps: dict[int, Path]) -> None:
        name = folder.name
        if not name.startswith(PARAMETERS) or name not in shapes:
            raise ConfigError(f"{folder}: unknown parameter")
        found = [stem for stem in _FILES if (folder / f"{stem}.pt").is_file()]
        if "fp32" not in found or len(found) == 2:
            lacking = next(stem for stem in _FILES if stem not in found)
            raise ConfigError(f"{folder / lacking}.pt is missing")
        for stem in found:
            file = folder / f"{stem}.pt"
            archive = open_archive(file)
            content = archive.content
            tensor = content.get("param") if isinstance(content, Mapping) else content
            stored = archive.stored(tensor, name)
            if len(stored.shape) == 1 and stored.contiguous and stored.shape[0] == prod(shapes[name]):
                stored = reshaped(stored, shapes[name])
            if stored.shape != shapes[name]:
                raise ConfigError(f"{file}: {name} has shape {stored.shape}, expected {shapes[name]}")
            self._stored[f"{_FILES[stem]}.{name}"] = stored
        file = folder / "step.pt"
        if file.is_file():
            archive = open_archive(file)
            step = stored_number(archive, archive.content, name="step", file=file)
            if step is not None:
                steps.setdefault(step, file)

    def _read_optimizer(self, steps: dict[int, Path]) -> None:
        """Note the step that ZeRO-3's conversion keeps in the common file alone."""
        file = self.path / "zero" / _OPTIMIZER
        archive = open_archive(file)
        inner = archive.content.get("optimizer_state_dict") if isinstance(archive.content, Mapping) else None
        states = inner.get("state") if isinstance(inner, Mapping) else None
        for state in states.values() if isinstance(states, Mapping) else ():
            step = stored_number(archive, state.get("step"), name="step", file=file)
            if step is not None:
                steps.setdefault(step, file)


def write_universal(
    folder: Path,
    source: CheckpointReader,
    meta: CheckpointMeta,
    *,
    workers: int = 1,
    memory: int | None = None,
    advance: Advance = lambda name: None,
) -> None:
    """Write a universal checkpoint into ``folder``, which exists; ``memory`` bounds the tensors that are held.

    ``source`` has moments, without which DeepSpeed loads no universal checkpoint. What is written loads under
    ZeRO-1, 2 and 3 on any number of ranks. A tensor that ZeRO-1/2 is to cut over tensor parallel ranks says along
    which dimension.
    """
    shapes = parameter_order(source)
    zero = folder / "zero"
    step = torch.tensor(float(meta.optimizer_steps))
    for name in shapes:
        (zero / name).mkdir(parents=True)
        _save(zero / name / "step.pt", step)

    budget = Budget(tensor_budget(source.specs.values(), memory))

    def save(full: str) -> None:
        kind, _, name = full.partition(".")
        stem = next(s for s, k in _FILES.items() if k == kind)
        with budget.hold(held_bytes(source.specs[full])):
            content: dict[str, Any] = {"param": source.read(full).float().contiguous()}
            dim = split_dim(name)
            if dim is not None:
                content["cat_dim"] = dim
            _save(zero / name / f"{stem}.pt", content)
            del content
        advance(full)

    with without_record_sums():
        in_threads(save, [f"{kind}.{name}" for kind in CARRIED for name in shapes], workers)
    files = [*zero.glob("*/*.pt"), *(zero / name for name in shapes)]
    # Waiting for the disk once is several times as fast as after each file.
    in_threads(make_durable, files, SYNC_THREADS)
    group = adamw_group(meta, [0])
    common = {
        "dynamic_loss_scale": False,
        "overflow": False,
        "clip_grad": float((meta.config.get("optimizer") or {}).get("clip_norm", 0.0)),
        "ds_version": VERSION,
        "param_groups": [group],
        # Where ZeRO-3 looks.
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [group]},
    }
    _save(zero / _OPTIMIZER, common)
    make_durable(zero / _OPTIMIZER)
    make_durable(zero)
    whole = ZeroLayout(dp=1, tp=1, stage=1)
    content = model_states([OrderedDict(shapes)], meta, whole, {})
    for file in (*whole.model_files(0), *ZeroLayout(dp=1, tp=1, stage=3).model_files(0)):
        _save(folder / file, content)
        make_durable(folder / file)


def _save(file: Path, content: object) -> None:
    with file.open("wb") as raw:
        torch.save(content, ChecksummedFile(raw))  # type: ignore[arg-type]
