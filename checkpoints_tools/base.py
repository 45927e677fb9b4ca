"""The interface of all checkpoint formats: named tensors that are read one at a time.

Names are the canonical checkpoint's, whatever the file holds: ``model.denoiser.*``, ``model.repa_head.*``,
``ema.denoiser.*``, ``exp_avg.*``, ``exp_avg_sq.*``, with the single-device model's names and shapes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data_pipeline.storage.files import atomic_folder
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.errors import ConfigError, RunError
from deco_scale.models import ModelConfig

MODEL, EMA, REPA = "model.denoiser.", "ema.denoiser.", "model.repa_head."
PREFIXES = {"model": MODEL, "ema": EMA}
SETS = ("model", "ema", "exp_avg", "exp_avg_sq", "fp8")
"""The sets of tensors: the first part of a canonical name; ``fp8`` are scaling factors."""

Advance = Callable[[str], None]
"""Called with the name of each finished tensor."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A planned write of ``count`` tensors, which ``lines`` describe.

    ``run(target, advance=advance)`` returns what ``meta.json`` holds, None for formats without it.
    """

    lines: Sequence[str]
    count: int
    run: Callable[..., CheckpointMeta | None]

    def write(self, target: Path, advance: Advance = lambda name: None) -> CheckpointMeta | None:
        """Write the new file or folder ``target``; raises :class:`RunError` if the disk cannot be written."""
        return self.run(target, advance=advance)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and type of a stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class CheckpointReader(ABC):
    """A checkpoint that is open for reading. Reading is safe from several threads at once.

    Opening reads headers only. It raises :class:`ConfigError` for damaged or unknown content, and compares every
    size in the headers with the files' sizes, so that no header can make a reader allocate more than the files
    hold.
    """

    path: Path
    format: str
    """The format in words, such as ``canonical`` or ``release .ckpt``."""
    specs: Mapping[str, TensorSpec]
    """All tensors by canonical name, sorted."""
    model: ModelConfig
    """Architecture, inferred from the tensors; a configuration that contradicts it is an error."""
    meta: CheckpointMeta | None = None
    """Progress and configuration of the run; None for formats without them."""
    facts: Mapping[str, Any] = MappingProxyType({})
    """Further facts to show, such as a Lightning file's ``global_step``."""

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor on the CPU in its stored type, contiguous and owned by the caller.

        ``rows`` are start and end along dimension 0; formats that store another layout may read a full tensor for
        them. Raises :class:`ConfigError` naming file and tensor if data are damaged.
        """


def refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new one")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes ``target`` at the end; after an error nothing is left behind.

    Raises :class:`ConfigError` if ``target`` exists, :class:`RunError` if the disk cannot be written.
    """
    refuse_existing(target)
    with write_errors(target), atomic_folder(target) as folder:
        yield folder


@contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn errors of the operating system into :class:`RunError`."""
    try:
        yield
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error


def read_checked(read: Callable[[str], Tensor], name: str, spec: TensorSpec) -> Tensor:
    """``read(name)`` as a contiguous tensor of the spec's type; raises :class:`ConfigError` for another shape."""
    tensor = read(name)
    if tuple(tensor.shape) != spec.shape:
        raise ConfigError(f"{name} has shape {tuple(tensor.shape)}, expected {spec.shape}")
    return tensor.detach().to(spec.dtype).contiguous()


def pieces(spec: TensorSpec, *, max_elements: int) -> list[tuple[int, int] | None]:
    """Row ranges of at most ``max_elements`` each (one row at least), in order; None for a 0-dim tensor."""
    if not spec.shape:
        return [None]
    width = max(1, spec.numel // max(1, spec.shape[0]))
    step = max(1, max_elements // width)
    return [(start, min(start + step, spec.shape[0])) for start in range(0, spec.shape[0], step)]
