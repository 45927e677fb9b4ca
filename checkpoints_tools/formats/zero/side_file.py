"""DeepSpeed's checkpoint files: their headers without running code, and the side file with what they cannot carry.

DeepSpeed's files name three classes of its own. They are read as inert shells; any other name is refused.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.base import MODEL, Advance, CheckpointReader, TensorSpec
from checkpoints_tools.formats.tensor_files import SafetensorsStore
from checkpoints_tools.formats.torch_zip import Archive, StoredTensor
from checkpoints_tools.infer_config import check_shapes, model_of
from checkpoints_tools.safetensors_out import write_safetensors
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

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


class _LossScaler:
    """Stands for DeepSpeed's class of this name."""


class _FragmentAddress:
    """Stands for DeepSpeed's ``fragment_address``."""


class _ZeroStage(int):
    """Stands for DeepSpeed's ``ZeroStageEnum``."""


_SHELLS: list[Any] = [
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_FragmentAddress, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_ZeroStage, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What DeepSpeed says of the run: steps with and without skipped ones, and samples."""

    step: int
    optimizer_steps: int
    samples: int


def open_archive(file: Path) -> Archive:
    """An archive's header; classes other than DeepSpeed's three are refused by name."""
    with torch.serialization.safe_globals(_SHELLS):
        return Archive(file)


def entry(content: Any, *keys: str, file: Path) -> Any:
    """What lies under ``keys``; raises :class:`ConfigError` naming the file and the key that is missing."""
    for key in keys:
        if not isinstance(content, Mapping) or key not in content:
            raise ConfigError(f"{file} has no {'/'.join(keys)}, which DeepSpeed's files have")
        content = content[key]
    return content


def stored_number(archive: Archive, value: object, *, name: str, file: Path) -> int | None:
    """A step count, stored as a number or as a tensor of one element; None where there is none."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ConfigError(f"{file}: {name} has {value.numel()} elements, not one")
        value = float(archive.stored(value, name).read().double().reshape(()))
    if not isinstance(value, int | float) or not float(value).is_integer() or value < 0:
        raise ConfigError(f"{file}: {name} is {value!r}, which is no count of steps")
    return int(value)


def model_progress(content: Any, file: Path) -> tuple[int, int, int]:
    """Steps, skipped steps and samples of a model-states file."""
    numbers = [entry(content, key, file=file) for key in ("global_steps", "skipped_steps", "global_samples")]
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise ConfigError(f"{file}: global_steps, skipped_steps and global_samples are {numbers}")
    return numbers[0], numbers[1], numbers[2]


def parameter_shapes(content: Any, file: Path) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of each group, in the order in which they are flattened."""
    groups = entry(content, "param_shapes", file=file)
    if content.get("frozen_param_shapes"):
        frozen = next(iter(content["frozen_param_shapes"]))
        raise ConfigError(f"{file}: {frozen} is frozen; checkpoints with frozen parameters are not supported")
    if not isinstance(groups, list) or not all(isinstance(g, Mapping) for g in groups):
        raise ConfigError(f"{file}: param_shapes is not a list of groups of parameters")
    sizes = [s for group in groups for s in group.values()]
    if not all(isinstance(s, tuple) and all(isinstance(n, int) and n >= 0 for n in s) for s in sizes):
        raise ConfigError(f"{file}: param_shapes has something else than shapes")
    found: list[dict[str, tuple[int, ...]]] = [{n: tuple(s) for n, s in group.items()} for group in groups]
    names = [name for group in found for name in group]
    strangers = [n for n in names if not isinstance(n, str) or not n.startswith(PARAMETERS)]
    if strangers or not names:
        what = f"unknown parameter {strangers[0]!r}" if strangers else "no parameter"
        raise ConfigError(f"{file}: {what}; ours begin with {' or '.join(PARAMETERS)}")
    return found


def resolve_tag(path: Path, pointer: str) -> Path:
    """The folder that holds the files: ``path``, or what its ``latest`` or ``latest_universal`` file names."""
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
    said = {"meta": json.dumps(dataclasses.asdict(meta))}
    specs = {name: TensorSpec(source.specs[name].shape) for name in names}
    write_safetensors(folder, SIDE, specs, source.read, metadata=said, advance=advance)


def read_side(folder: Path, step: int) -> tuple[SafetensorsStore | None, CheckpointMeta | None]:
    """The side file of a tag folder, if any; raises :class:`ConfigError` where it is of another step."""
    file = folder / f"{SIDE}.safetensors"
    if not file.is_file():
        return None, None
    store = SafetensorsStore(file, [file])
    try:
        meta = CheckpointMeta(**json.loads(store.facts["meta"]))
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{file} does not say in its metadata where the run stood") from error
    if meta.step != step:
        raise ConfigError(
            f"{file} is of step {meta.step}, the files beside it of step {step}: the run has gone on since; "
            "move the side file away"
        )
    strangers = [n for n in store.specs if n.split(".")[0] not in ("ema", "fp8")]
    if strangers:
        raise ConfigError(f"{file}: unknown tensor {strangers[0]!r}")
    return store, meta


def check_sets(specs: Mapping[str, TensorSpec], where: Path) -> ModelConfig:
    """The model of a source's tensors; each set must have the shapes of the weights."""
    model = model_of(specs, None, where=str(where))
    weights = {n.removeprefix("model."): s.shape for n, s in specs.items() if n.startswith("model.")}
    denoiser = {n: s for n, s in weights.items() if n.startswith(MODEL.removeprefix("model."))}
    for kind, wanted in (("exp_avg.", weights), ("exp_avg_sq.", weights), ("ema.", denoiser)):
        found = {n.removeprefix(kind): s.shape for n, s in specs.items() if n.startswith(kind)}
        if found:
            check_shapes(found, wanted, where=f"{where} ({kind}*)")
    narrow = [n for n, s in specs.items() if not s.dtype.is_floating_point or s.dtype.itemsize > 4]
    if narrow:
        raise ConfigError(f"{where}: {narrow[0]} is {specs[narrow[0]].dtype}, which fp32 does not hold")
    return model


def reshaped(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    """A contiguous stored tensor under another shape of as many elements."""
    stride = torch.empty(shape, device="meta").stride()
    return dataclasses.replace(stored, shape=shape, stride=stride)
