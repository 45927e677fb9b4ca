"""Converting a checkpoint between canonical folders and DeepSpeed's native and universal ones, bit-exactly."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints_tools.base import EMA, MODEL, Advance, CheckpointReader, Plan, TensorSpec, new_folder
from checkpoints_tools.convert import bare_config, new_meta
from checkpoints_tools.formats.canonical import CanonicalReader, write_canonical
from checkpoints_tools.formats.universal import UniversalReader, largest_peak, write_universal
from checkpoints_tools.formats.zero.reader import ZeroReader
from checkpoints_tools.formats.zero.side_file import CARRIED, write_side
from checkpoints_tools.formats.zero.writer import ZeroLayout, parameter_order, write_zero
from checkpoints_tools.memory_budget import peak_bytes
from data_pipeline.storage.files import make_durable, write_durably
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.models.tp_plan import check_tp

Form = Literal["canonical", "deepspeed", "universal"]
DEFAULT_MEMORY = 4 * 2**30
DEFAULT_FILES = 4
"""Tensor files of a canonical folder, which can be written in parallel."""
_ELEMENT = torch.float32.itemsize
_COPIES = 3
"""Copies of a tensor that a worker may have: as read, in fp32, and on its way to the file."""
_MAX_PIECE = 2**23
Write = Callable[..., Any]
_UNITS = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def byte_count(text: str) -> int:
    """Bytes from ``1000``, ``512MiB`` or ``4GiB``; raises ValueError for anything else."""
    unit = next((u for u in _UNITS if u and text.endswith(u)), "")
    count = int(text.removesuffix(unit)) * _UNITS[unit]
    if count < 1:
        raise ValueError(f"{text} is not a number of bytes")
    return count


def plan_reshard(
    source: CheckpointReader,
    *,
    to: Form,
    layout: ZeroLayout | None = None,
    files: int | None = None,
    workers: int = 1,
    memory: int = DEFAULT_MEMORY,
    ema_from_model: bool = False,
    config: RunConfig | None = None,
) -> Plan:
    """Plan a conversion without reading tensor data; raises :class:`ConfigError` for an impossible one.

    ``memory`` bounds the bytes of tensors in memory: ``workers`` wait for each other if they need more.
    """
    if not isinstance(source, CanonicalReader | ZeroReader | UniversalReader):
        raise ConfigError(f"{source.path} is {source.format}; import it first (deco-ckpt import)")
    if (to == "deepspeed") != (layout is not None):
        raise ConfigError("--dp and --zero-stage are given with --to deepspeed, and with nothing else")
    if to != "canonical" and files is not None:
        raise ConfigError("--files is for --to canonical")
    view = _with_ema(source, from_model=ema_from_model)
    meta, lines = _meta_of(source, config)
    if ema_from_model:
        lines.append("EMA starts at the weights")
    if f"exp_avg.{next(iter(parameter_order(source)))}" not in source.specs:
        if to == "universal":
            raise ConfigError(
                f"{source.path} has no moments, without which DeepSpeed loads no universal checkpoint"
            )
        lines.append("there are no optimizer moments")
    total = sum(spec.numel for spec in view.specs.values()) * _ELEMENT
    lines.append(f"{source.format}: {len(view.specs):,} tensors, {total / 2**20:,.1f} MiB in fp32, to {to}")
    run: Write
    if layout is not None:
        check_tp(source.model, layout.tp)
        lines += _files_of(source, layout)
        piece = _piece_elements(view, workers, memory)
        fill = partial(write_zero, source=view, meta=meta, layout=layout, workers=workers, piece_elements=piece)
        run = partial(_write_tag, view=view, meta=meta, pointer="latest", fill=fill)
    else:
        largest = max(peak_bytes(spec) for spec in view.specs.values())
        if to == "universal":
            largest = max(largest, largest_peak(view))
        if largest > memory:
            raise ConfigError(f"--memory {memory}: the largest tensor needs {largest} bytes")
        if to == "canonical":
            files = files or DEFAULT_FILES
            lines.append(f"{files} tensor files")
            specs = {n: TensorSpec(s.shape) for n, s in view.specs.items()}
            run = partial(write_canonical, specs=specs, read=view.read, meta=meta, files=files)
            run = partial(run, workers=workers, memory=memory)
        else:
            fill = partial(write_universal, source=view, meta=meta, workers=workers, memory=memory)
            run = partial(_write_tag, view=view, meta=meta, pointer="latest_universal", fill=fill)
    return Plan(lines, len(view.specs), run)


def _piece_elements(view: CheckpointReader, workers: int, memory: int) -> int:
    """Elements of a tensor that each worker of DeepSpeed's writer may have in memory."""
    piece = min(_MAX_PIECE, memory // (_COPIES * _ELEMENT * workers))
    widest_row = max(s.numel // max(1, s.shape[0]) if s.shape else 1 for s in view.specs.values())
    # The side file is written tensor by tensor.
    largest = max((view.specs[n].numel for n in _side_names(view)), default=0)
    if piece < widest_row or largest * _ELEMENT * _COPIES > memory:
        needed = _ELEMENT * _COPIES * max(widest_row * workers, largest)
        raise ConfigError(f"--memory {memory}: rows of tensors and the largest one of the EMA need {needed} bytes")
    return piece


def _write_tag(
    target: Path, *, view: CheckpointReader, meta: CheckpointMeta, pointer: str, fill: Write, advance: Advance
) -> None:
    """Write a folder with a tag's folder in it, which ``fill`` fills, and the file that names the tag."""
    with new_folder(target) as temporary:
        folder = temporary / f"global_step{meta.step}"
        folder.mkdir()
        fill(folder, advance=advance)
        write_side(folder, view, _side_names(view), meta, advance)
        make_durable(folder)
        write_durably(temporary / pointer, folder.name.encode())


def _with_ema(source: CheckpointReader, *, from_model: bool) -> CheckpointReader:
    has = any(n.startswith(EMA) for n in source.specs)
    if has and from_model:
        raise ConfigError(f"{source.path} has an EMA; --ema-from is for sources without one")
    if not has and not from_model:
        raise ConfigError(f"{source.path} has no EMA; --ema-from model starts it at the weights")
    return source if has else _WithEma(source)


class _WithEma(CheckpointReader):
    """A source with its weights as its EMA."""

    def __init__(self, source: CheckpointReader) -> None:
        self._source = source
        self.path, self.format, self.model = source.path, source.format, source.model
        self.meta, self.facts = source.meta, source.facts
        weights = [n for n in source.specs if n.startswith(MODEL)]
        self._origin = {EMA + n.removeprefix(MODEL): n for n in weights}
        own = {n: s for n, s in source.specs.items() if not n.startswith(EMA)}
        self.specs = dict(sorted((own | {ema: own[n] for ema, n in self._origin.items()}).items()))

    def read(self, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        return self._source.read(self._origin.get(name, name), rows)


def _meta_of(
    source: CanonicalReader | ZeroReader | UniversalReader, config: RunConfig | None
) -> tuple[CheckpointMeta, list[str]]:
    """The run's progress and configuration, and a line for the user if the source has none."""
    known = source.meta if isinstance(source, CanonicalReader) else source.side_meta
    if known is not None:
        if config is not None:
            raise ConfigError(f"{source.path} has its configuration; --config is for sources without one")
        return known, []
    assert not isinstance(source, CanonicalReader)
    if config is not None and config.model != source.model:
        raise ConfigError(f"--config: its model is {config.model}, that of {source.path} is {source.model}")
    cfg = config or bare_config(source, resolution=None, text_encoder=None)
    step = source.progress.step
    ends = [sum(s.steps for s in cfg.stages[: i + 1]) for i in range(len(cfg.stages))]
    stage = next((s for s, end in zip(cfg.stages, ends, strict=True) if step < end), cfg.stages[-1])
    state = {"resharded_from": source.path.name, "format": source.format}
    meta = new_meta(cfg, stage.name, state, source.progress)
    origin = "that of --config" if config is not None else "one that has what sampling needs"
    return meta, [f"the data position is unknown; the stored configuration is {origin}"]


def _side_names(source: CheckpointReader) -> list[str]:
    return [n for n in source.specs if n.split(".")[0] not in CARRIED]


def _files_of(source: CheckpointReader, layout: ZeroLayout) -> list[str]:
    """Files and the sizes of their tensors, for the plan."""
    shapes = parameter_order(source)
    _, parts = layout.partition(shapes)
    moments = 2 if f"exp_avg.{next(iter(shapes))}" in source.specs else 0
    lines = []
    for dp in range(layout.dp):
        size = (sum(parts.used[dp]) + moments * sum(parts.sizes)) * _ELEMENT
        lines += [f"{layout.optim_file(tp, dp)}: {size:,} bytes of tensors" for tp in range(layout.tp)]
    return lines
