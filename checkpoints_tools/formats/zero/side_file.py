"""DeepSpeed's checkpoint files: reading headers without running code, and the side file for what they cannot hold.

DeepSpeed's files name three classes of its own. Inert classes take their place; any other name is refused.
"""

import dataclasses
import json
import re
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import Advance, CheckpointReader, TensorSpec
from checkpoints_tools.formats.tensor_files import SafetensorsStore, write_safetensors
from checkpoints_tools.formats.torch_zip import Archive
from checkpoints_tools.infer_config import check_fits_fp32, check_sets
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.errors import ConfigError

SIDE = "deco_scale"
"""Stem of the safetensors file beside DeepSpeed's own, with EMA, scaling factors and ``meta.json``'s contents."""
VERSION = "0.19.8"
"""The DeepSpeed whose file layout is written."""
CARRIED = ("model", "exp_avg", "exp_avg_sq")
"""Sets that DeepSpeed's own files carry."""
PARAMETERS = ("denoiser.", "repa_head.")
_NUMBER = r"(\d{1,6})"
OPTIM = re.compile(rf"(?:bf16_)?zero_pp_rank_{_NUMBER}_mp_rank_{_NUMBER}_?optim_states\.pt")
MODEL_STATES = re.compile(rf"(?:zero_pp_rank_{_NUMBER}_)?mp_rank_{_NUMBER}_model_states\.pt")


_SHELLS: list[Any] = [
    (type("LossScaler", (), {}), "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (type("FragmentAddress", (), {}), "deepspeed.utils.tensor_fragment.fragment_address"),
    (type("ZeroStage", (int,), {}), "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""Inert classes that stand for DeepSpeed's of these names."""


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """The run's progress in DeepSpeed's files: steps with and without skipped ones, and samples."""

    step: int
    optimizer_steps: int
    samples: int


def open_archive(file: Path) -> Archive:
    """An archive's header; any class but DeepSpeed's three is refused by name."""
    with torch.serialization.safe_globals(_SHELLS):
        return Archive(file)


def entry(content: Any, key: str, file: Path) -> Any:
    """The value under ``key``; raises :class:`ConfigError` naming the file and the missing key."""
    if not isinstance(content, Mapping) or key not in content:
        raise ConfigError(f"{file} has no {key}, which DeepSpeed's files have")
    return content[key]


def stored_step(archive: Archive, value: object) -> int | None:
    """A step count, stored as a number or as a tensor of one element; None where there is none."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(f"{archive.file}: step has {value.numel()} elements, not one")
        value = float(archive.stored(value, "step").read().double().reshape(()))
    if not isinstance(value, int | float) or not float(value).is_integer() or value < 0:
        raise ConfigError(f"{archive.file}: step is {value!r}, which is not a number of steps")
    return int(value)


def ranks_of(pattern: re.Pattern[str], file: Path) -> tuple[int, int | None]:
    """Tensor and data parallel rank in a file's name; None where one file serves all data parallel ranks."""
    match = pattern.fullmatch(file.name)
    if match is None:
        raise ConfigError(f"{file} is a file of pipeline or expert parallelism, which is not supported")
    return int(match[2]), int(match[1]) if match[1] else None


def parameter_shapes(content: Any, file: Path) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of each group, in the order in which they are flattened."""
    groups = entry(content, "param_shapes", file)
    if content.get("frozen_param_shapes"):
        frozen = next(iter(content["frozen_param_shapes"]))
        raise ConfigError(f"{file}: {frozen} is frozen; checkpoints with frozen parameters are not supported")
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        raise ConfigError(f"{file}: param_shapes is not a list of groups of parameters")
    sizes = [s for group in groups for s in group.values()]
    if not all(isinstance(s, tuple) and all(isinstance(n, int) and n >= 0 for n in s) for s in sizes):
        raise ConfigError(f"{file}: param_shapes has entries that are not shapes")
    shapes: list[dict[str, tuple[int, ...]]] = [{n: tuple(s) for n, s in group.items()} for group in groups]
    names = [name for group in shapes for name in group]
    unknown = [n for n in names if not isinstance(n, str) or not n.startswith(PARAMETERS)]
    if unknown or not names:
        what = f"unknown parameter {unknown[0]!r}" if unknown else "no parameter"
        raise ConfigError(f"{file}: {what}; ours begin with {' or '.join(PARAMETERS)}")
    return shapes


def resolve_tag(path: Path, pointer: str) -> Path:
    """The folder with the files: ``path``, or the one that its ``latest`` or ``latest_universal`` file names."""
    file = path / pointer
    if not file.is_file():
        return path
    try:
        tag = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    if "/" in tag or tag in ("", ".", "..") or not (path / tag).is_dir():
        raise ConfigError(f"{file} names {tag!r}, which is no folder beside it")
    return path / tag


def write_side(
    folder: Path, source: CheckpointReader, names: list[str], meta: CheckpointMeta, advance: Advance
) -> None:
    """Write the tensors of ``names`` and ``meta`` beside DeepSpeed's files, tensor by tensor."""
    metadata = {"meta": json.dumps(dataclasses.asdict(meta))}
    specs = {name: TensorSpec(source.specs[name].shape) for name in names}
    write_safetensors(folder, SIDE, specs, source.read, metadata=metadata, advance=advance)


def read_side(folder: Path, step: int) -> tuple[SafetensorsStore | None, CheckpointMeta | None]:
    """The side file of a tag folder, if any; raises :class:`ConfigError` if it is of another step."""
    file = folder / f"{SIDE}.safetensors"
    if not file.is_file():
        return None, None
    store = SafetensorsStore(file, [file])
    try:
        meta = CheckpointMeta(**json.loads(store.facts["meta"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} has no valid progress in its metadata") from error
    if meta.step != step:
        raise ConfigError(
            f"{file} is of step {meta.step}, the files beside it of step {step}: the run has gone on since; "
            "move the side file away"
        )
    unknown = [n for n in store.specs if n.split(".")[0] not in ("ema", "fp8")]
    if unknown:
        raise ConfigError(f"{file}: unknown tensor {unknown[0]!r}")
    return store, meta


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStates:
    """A ``*model_states.pt`` file: counts of ranks from its header, its ranks, shapes of parameters by group."""

    file: Path
    content: Mapping[str, Any]
    tp: int
    dp: int | None
    groups: list[dict[str, tuple[int, ...]]]


class DeepSpeedReader(CheckpointReader):
    """What the readers of DeepSpeed's layouts share; subclasses call :meth:`_finish` and have ``_read_own``.

    Opening reads the model-states files, which must agree on the run's progress.
    """

    def __init__(self, path: Path, pointer: str) -> None:
        self.path = resolve_tag(path, pointer)
        self._model_states: list[ModelStates] = []
        progress: dict[tuple[int, ...], Path] = {}
        for file in sorted(self.path.glob("*model_states.pt")):
            tp, dp = ranks_of(MODEL_STATES, file)
            content = open_archive(file).content
            keys = ("global_steps", "skipped_steps", "global_samples")
            numbers = tuple(entry(content, key, file) for key in keys)
            if not all(isinstance(n, int) and n >= 0 for n in numbers):
                raise ConfigError(f"{file}: {', '.join(keys)} are {list(numbers)}")
            progress[numbers] = file
            groups = parameter_shapes(content, file)
            # Of thousands of files only what is needed stays in memory.
            alike = next((other.groups for other in self._model_states if other.groups == groups), groups)
            sizes = {key: size for key, size in content.items() if key in ("dp_world_size", "mp_world_size")}
            self._model_states.append(ModelStates(file, sizes, tp, dp, alike))
        if not progress:
            raise ConfigError(f"{self.path} has no *_model_states.pt file, which holds the run's progress")
        if len(progress) > 1:
            (one, a), (other, b) = sorted(progress.items())[:2]
            raise ConfigError(
                f"{self.path} mixes steps: {a.name} is of step {one[0]}, {b.name} of step {other[0]}"
            )
        self._step, self._skipped, self._samples = next(iter(progress))

    def _finish(self, specs: Mapping[str, TensorSpec], optimizer_steps: int | None) -> None:
        """Add the side file to DeepSpeed's own tensors, and check that all are a model's."""
        counted = self._step - self._skipped if optimizer_steps is None else optimizer_steps
        self.progress = Progress(self._step, counted, self._samples)
        self.facts: dict[str, Any] = {"step": self._step}
        self._side, self.side_meta = read_side(self.path, self._step)
        self.specs = dict(sorted({**specs, **(self._side.specs if self._side else {})}.items()))
        self.model = check_sets(self.specs, None, where=str(self.path))
        check_fits_fp32(self.specs, self.path)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        if self._side is not None and name in self._side.specs:
            return self._side.read(name, rows)
        return self._read_own(name, rows)

    @abstractmethod
    def _read_own(self, name: str, rows: tuple[int, int] | None) -> Tensor:
        """A tensor of DeepSpeed's own files, as :meth:`read`."""
