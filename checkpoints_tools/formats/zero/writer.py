"""Canonical tensors as the files that DeepSpeed's ``load_checkpoint`` reads under ZeRO-1, 2 or 3.

Files are first created by ``torch.save`` without data and then filled in place, some rows of one tensor at a time,
so that memory does not grow with a rank's share. The CRC-32 of the archives' records are those of blank records:
``torch.load`` ignores them, ``unzip`` complains.
"""

import dataclasses
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import Advance, CheckpointReader, TensorSpec, pieces
from checkpoints_tools.formats.torch_zip import StoredTensor
from checkpoints_tools.formats.zero.layout import (
    Partitions,
    Shape,
    joined_shapes,
    overlaps,
    partitions,
    sub_groups,
    tp_shape,
)
from checkpoints_tools.formats.zero.reader import optim_content
from checkpoints_tools.formats.zero.side_file import CARRIED, VERSION, open_archive
from checkpoints_tools.infer_config import denoiser_shapes
from checkpoints_tools.memory_budget import in_threads, sync_files
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.integrity import WRITE_BYTES, raw_bytes, start_flush
from deco_scale.errors import ConfigError
from deco_scale.models.stored_names import part_of
from deco_scale.models.tp_plan import split_dim
from deco_scale.optim.lr_schedule import LrScheduleConfig
from deco_scale.training.config import StageConfig

Groups = list[dict[str, Shape]]
"""Shapes of a tp rank's parameters by group."""
_REPA_LAYERS = (0, 2, 4)


@dataclass(frozen=True, slots=True)
class ZeroLayout:
    """How a checkpoint is partitioned: ranks, stage, and whether the run has DeepSpeed's ``bf16.enabled``."""

    dp: int
    tp: int
    stage: int
    bf16: bool = False

    def partition(self, shapes: Mapping[str, Shape]) -> tuple[Groups, Partitions]:
        """From shapes of stored tensors: a tp rank's parameters by group, and where their elements are."""
        local = joined_shapes({name: tp_shape(name, shape, self.tp) for name, shape in shapes.items()})
        groups = sub_groups(local, dp=self.dp, stage=self.stage)
        return groups, partitions(groups, dp=self.dp, stage=self.stage)

    def optim_file(self, tp: int, dp: int) -> str:
        return f"{'bf16_' if self.bf16 else ''}zero_pp_rank_{dp}_mp_rank_{tp:02d}_optim_states.pt"

    def model_files(self, tp: int) -> list[str]:
        name = f"mp_rank_{tp:02d}_model_states.pt"
        return [f"zero_pp_rank_{dp}_{name}" for dp in range(self.dp)] if self.stage == 3 else [name]


def parameter_order(source: CheckpointReader) -> dict[str, Shape]:
    """Stored tensors in the order of the module that is trained, which is the order in the flat buffers."""
    order = [f"denoiser.{name}" for name in denoiser_shapes(source.model)]
    order += [f"repa_head.layers.{i}.{kind}" for i in _REPA_LAYERS for kind in ("weight", "bias")]
    shapes = {name: source.specs[f"model.{name}"].shape for name in order if f"model.{name}" in source.specs}
    unknown = [n for n in source.specs if n.startswith("model.") and n.removeprefix("model.") not in shapes]
    if unknown:
        raise ConfigError(f"{source.path}: unknown parameter {unknown[0]}")
    return shapes


def model_states(
    groups: Groups, meta: CheckpointMeta, layout: ZeroLayout, module: Mapping[str, Tensor | None]
) -> dict[str, Any]:
    """Content of a model-states file; ``groups`` are the local shapes by group."""
    return {
        "module": OrderedDict(module),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((n, torch.Size(s)) for n, s in group.items()) for group in groups],
        "frozen_param_shapes": OrderedDict() if layout.stage == 3 else None,
        "shared_params": {},
        "frozen_param_fragments": OrderedDict() if layout.stage == 3 else None,
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": max(0, meta.step - meta.optimizer_steps),
        "global_steps": meta.step,
        "global_samples": meta.samples,
        "dp_world_size": layout.dp,
        "mp_world_size": layout.tp,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": layout.tp},
        "ds_config": {"zero_optimization": {"stage": layout.stage}},
        "ds_version": VERSION,
    }


def adamw_group(meta: CheckpointMeta, ids: list[int]) -> dict[str, Any]:
    """An optimizer group as ``torch.optim.AdamW`` saves it, with the configuration's values for the last step."""
    optimizer = meta.config.get("optimizer") or {}
    options = {key: optimizer[key] for key in ("eps", "weight_decay") if key in optimizer}
    start = 0
    for raw in meta.config.get("stages") or []:
        if raw["name"] == meta.stage:
            stage = _stage_config(raw)
            options |= {"lr": stage.lr_at(max(1, meta.step - start)), "betas": tuple(stage.betas)}
            break
        start += raw["steps"]
    group: dict[str, Any] = torch.optim.AdamW([torch.zeros(1)], **options).state_dict()["param_groups"][0]
    return group | {"params": ids}


def _stage_config(raw: Mapping[str, Any]) -> StageConfig:
    """A stage of a checkpoint's configuration; of older versions it has no schedule."""
    known = {key: raw[key] for key in (field.name for field in dataclasses.fields(StageConfig)) if key in raw}
    return StageConfig(**known | {"lr_schedule": LrScheduleConfig(**raw.get("lr_schedule", {}))})


def write_zero(
    folder: Path,
    source: CheckpointReader,
    meta: CheckpointMeta,
    layout: ZeroLayout,
    *,
    workers: int,
    piece_elements: int,
    advance: Advance,
) -> None:
    """Write the files of all ranks into the existing ``folder``; a worker holds ``piece_elements`` of a tensor.

    Moments that ``source`` lacks are left out, and the EMA is not written here. All files are made durable.
    """
    shapes = parameter_order(source)
    groups, parts = layout.partition(shapes)
    has_moments = f"exp_avg.{next(iter(shapes))}" in source.specs
    module = _module(groups, layout)
    optim: dict[tuple[int, int], _Blank] = {}
    models: dict[int, dict[str, StoredTensor]] = {}
    with ExitStack() as files:
        for tp in range(layout.tp):
            for name in layout.model_files(tp):
                file = folder / name
                _save_blank(file, model_states(groups, meta, layout, module))
                if layout.stage != 3:
                    archive = open_archive(file)
                    module_tensors = archive.content["module"].items()
                    models[tp] = {n: archive.stored(t, n) for n, t in module_tensors if isinstance(t, Tensor)}
            for dp in range(layout.dp):
                file = folder / layout.optim_file(tp, dp)
                _save_blank(file, _optim_states(groups, parts, dp, meta, layout, has_moments))
                optim[tp, dp] = _Blank(file, meta.optimizer_steps, files)
        firsts = [folder / layout.model_files(tp)[0] for tp in range(layout.tp)]
        descriptors = [files.enter_context(file.open("r+b")).fileno() for file in firsts]

        def fill(name: str) -> None:
            kind, _, stored = name.partition(".")
            parameter, index, _ = part_of(stored)
            offset = index * prod(tp_shape(stored, shapes[stored], layout.tp))
            for start, part, tp in _tp_pieces(source, name, layout.tp, piece_elements):
                first = offset + start
                for extent in overlaps(parts.extents[parameter], first, part.numel()):
                    values = part[extent.first - first : extent.first - first + extent.count]
                    optim[tp, extent.rank].put(kind, extent.group, extent.start, values)
                if kind == "model" and layout.stage != 3:
                    _put(descriptors[tp], models[tp][parameter], first, part)
            advance(name)

        kinds = CARRIED if has_moments else CARRIED[:1]
        names = [f"{kind}.{name}" for kind in kinds for name in shapes]
        in_threads(fill, names, workers)
        sync_files([*(blank.descriptor for blank in optim.values()), *descriptors])


class _Blank:
    """An optimizer file that has its layout and is to be filled."""

    def __init__(self, file: Path, steps: int, files: ExitStack) -> None:
        archive = open_archive(file)
        content = optim_content(archive)
        self.descriptor = files.enter_context(file.open("r+b")).fileno()
        self._tensors = {kind: [archive.stored(t, kind) for t in each] for kind, each in content.tensors.items()}
        for step in content.steps:
            if step is not None:
                _put(self.descriptor, archive.stored(step, "step"), 0, torch.tensor([float(steps)]))

    def put(self, kind: str, group: int, start: int, values: Tensor) -> None:
        _put(self.descriptor, self._tensors[kind][group], start, values)


def _module(groups: Groups, layout: ZeroLayout) -> dict[str, Tensor | None]:
    """The module's state: blank weights, or the empty stand-ins that ZeRO-3 saves."""
    dtype = torch.bfloat16 if layout.bf16 else torch.float32
    module: dict[str, Tensor | None] = {}
    for name, shape in (item for group in groups for item in group.items()):
        module[name] = torch.empty(0 if layout.stage == 3 else shape, dtype=dtype)
        if layout.tp > 1 and split_dim(name) is not None:
            # Megatron's layers have a state of their own, which is empty.
            module[f"{name.rpartition('.')[0]}._extra_state"] = None
    return module


def _optim_states(
    groups: Groups, parts: Partitions, dp: int, meta: CheckpointMeta, layout: ZeroLayout, has_moments: bool
) -> dict[str, Any]:
    try:
        from deepspeed.runtime.fp16.loss_scaler import LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ConfigError("--to deepspeed needs DeepSpeed: pip install 'deco-scale[deepspeed]'") from error
    state: dict[int, dict[str, Tensor]] = {}
    if has_moments:
        for i, size in enumerate(parts.sizes):
            state[i] = {"step": torch.empty(()), **{kind: torch.empty(size) for kind in CARRIED[1:]}}
    base = {"state": state, "param_groups": [adamw_group(meta, list(range(len(groups))))]}
    inner: dict[str, Any] = {
        "zero_stage": ZeroStageEnum(layout.stage),
        "loss_scaler": LossScaler(scale=1.0),
        "dynamic_loss_scale": False,
        "overflow": False,
    }
    masters = [torch.empty(size) for size in parts.used[dp]]
    if layout.stage == 3:
        inner |= {"partition_count": layout.dp, "optimizer_state_dict": base, "fp32_flat_groups": masters}
    else:
        optimizer = meta.config.get("optimizer") or {}
        inner |= {
            "clip_grad": float(optimizer.get("clip_norm", 0.0)),
            "base_optimizer_state": base,
            "single_partition_of_fp32_groups": masters,
            "group_paddings": [size - used for size, used in zip(parts.sizes, parts.used[dp], strict=True)],
            "param_alignment_paddings": [[0] * len(group) for group in groups],
            "partition_count": [layout.dp] * len(groups),
            "ds_version": VERSION,
            "param_slice_mappings": [
                OrderedDict(
                    (name, fragment_address(numel=e.count, start=e.start))
                    for name in group
                    for e in parts.extents[name]
                    if e.rank == dp
                )
                for group in groups
            ],
        }
    return {
        "optimizer_state_dict": inner,
        "ds_config": {"zero_optimization": {"stage": layout.stage}},
        "ds_version": VERSION,
    }


def _save_blank(file: Path, content: dict[str, Any]) -> None:
    """Save without the tensors' data; what is not filled later reads as zeros."""
    with torch.serialization.skip_data():
        torch.save(content, file)


def _put(descriptor: int, target: StoredTensor, start: int, values: Tensor) -> None:
    """Write elements of a flattened stored tensor from ``start`` on."""
    data = raw_bytes(values.to(target.dtype).contiguous())
    offset = first = target.start + start * target.dtype.itemsize
    while len(data):
        count = os.pwrite(descriptor, data[:WRITE_BYTES], offset)
        data, offset = data[count:], offset + count
    start_flush(descriptor, first, offset - first)


def _tp_pieces(source: CheckpointReader, name: str, tp: int, elements: int) -> Iterator[tuple[int, Tensor, int]]:
    """First element, values (flat, fp32) and tp rank of each piece of each tp rank's part of a tensor."""
    spec = source.specs[name]
    dim = split_dim(name) if tp > 1 else None
    for rows in pieces(spec, max_elements=elements):
        values = source.read(name, rows).float()
        start = rows[0] if rows is not None else 0
        width = TensorSpec(spec.shape[1:]).numel
        for rank in range(tp):
            if dim is None:
                yield start * width, values.reshape(-1), rank
            elif dim == 1:
                yield start * (width // tp), values.chunk(tp, dim=1)[rank].reshape(-1), rank
            else:
                height = spec.shape[0] // tp
                first, end = max(start, rank * height), min(start + len(values), (rank + 1) * height)
                if first < end:
                    yield (first - rank * height) * width, values[first - start : end - start].reshape(-1), rank
