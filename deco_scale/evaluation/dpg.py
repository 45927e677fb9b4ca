"""DPG-Bench: one grid of four pictures per prompt as its scorer reads them, and a table of what it found.

``dpg_bench/compute_dpg_bench.py`` of ``TencentQQGYLab/ELLA`` scores every file of a folder; a file's name up to
the first dot is the prompt's id, and with ``--pic-num 4`` it cuts the picture into 2 x 2 squares of
``--resolution`` pixels, row by row, without borders.
"""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from deco_scale.errors import ConfigError
from deco_scale.evaluation.files import write_png
from deco_scale.evaluation.imagenet import PicturesFn
from deco_scale.sampling.generate import SampleRequest

GRID = 2
PER_PROMPT = GRID * GRID
MAX_PROMPT_BYTES = 1 << 20
MAX_TAR_BYTES = 1 << 26
_ID = re.compile(r"[A-Za-z0-9_-]+")


class Prompt(NamedTuple):
    """``id`` is the file's name without ``.txt``, ``text`` its first line."""

    id: str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a folder or tar (plain or gzip) of ``<id>.txt``, in the order of their ids.

    Nothing is unpacked to the disk. Raises :class:`ConfigError` for a tar with links, absolute or climbing paths,
    files over 1 MiB or more than 64 MiB in all; for an id that the scorer would read differently; for a text
    that is empty or not UTF-8.
    """
    found: dict[str, str] = {}
    try:
        for name, data in _folder(path) if path.is_dir() else _tar(path):
            prompt = _prompt(path, name, data)
            if prompt.id in found:
                raise ConfigError(f"{path}: {name}: the id {prompt.id} is there twice")
            found[prompt.id] = prompt.text
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{path}: not a folder or tar of prompts: {error}") from error
    if not found:
        raise ConfigError(f"{path}: no .txt file in it")
    return [Prompt(key, found[key]) for key in sorted(found)]


def _prompt(path: Path, name: str, data: bytes) -> Prompt:
    key = name.rsplit("/", 1)[-1].removesuffix(".txt")
    if not _ID.fullmatch(key):
        raise ConfigError(f"{path}: {name}: an id may have letters, digits, - and _ only")
    try:
        lines = data.decode("utf-8").strip().split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: {name} is not UTF-8 text") from error
    if not lines[0]:
        raise ConfigError(f"{path}: {name} is empty")
    return Prompt(key, lines[0].strip())


def _folder(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.glob("*.txt")):
        if file.name.startswith("."):
            continue
        if file.stat().st_size > MAX_PROMPT_BYTES:
            raise ConfigError(f"{file} has over {MAX_PROMPT_BYTES} bytes: no prompt")
        yield file.name, file.read_bytes()


class _Limited(io.RawIOBase):
    """A stream that refuses to give more than ``limit`` bytes: what a small gzip may unfold to is unbounded."""

    def __init__(self, stream: BinaryIO, limit: int, path: Path) -> None:
        self._stream, self._left, self._path = stream, limit, path

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(min(size, self._left + 1) if size >= 0 else self._left + 1)
        self._left -= len(data)
        if self._left < 0:
            raise ConfigError(f"{self._path} unfolds to more than {MAX_TAR_BYTES} bytes: no set of prompts")
        return data


def _tar(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: Any = gzip.GzipFile(fileobj=file) if zipped else file
        with tarfile.open(fileobj=_Limited(stream, MAX_TAR_BYTES, path), mode="r|") as tar:
            for member in tar:
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                    raise ConfigError(f"{path}: {member.name!r} leads out of the tar; not a set of prompts")
                if member.isdir():
                    continue
                if not member.isreg():
                    raise ConfigError(f"{path}: {member.name!r} is a link or device; not a set of prompts")
                if member.size > MAX_PROMPT_BYTES:
                    raise ConfigError(f"{path}: {member.name!r} has {member.size} bytes: no prompt")
                # macOS puts such files beside each one.
                if parts[-1].startswith(".") or not parts[-1].endswith(".txt"):
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content.read()


def missing_prompts(prompts: Sequence[Prompt], folder: Path) -> list[Prompt]:
    """Prompts without a grid in ``folder``."""
    return [prompt for prompt in prompts if not (folder / f"{prompt.id}.png").is_file()]


def generate_images(
    draw: PicturesFn, prompts: Sequence[Prompt], folder: Path, *, on_picture: Callable[[], None]
) -> None:
    """Draw four pictures of each prompt, their noise seeded with 0 to 3, as ``folder/<id>.png``.

    Files on their way lie beside ``folder``: the scorer takes all that is in it for pictures.
    """
    drawn = draw([SampleRequest(prompt.text, i, seed=i) for prompt in prompts for i in range(PER_PROMPT)])
    for prompt in prompts:
        pictures = []
        for _ in range(PER_PROMPT):
            pictures.append(next(drawn)[1])
            on_picture()
        write_png(folder / f"{prompt.id}.png", grid_of(np.stack(pictures)), scratch=folder.parent)


def grid_of(pictures_PYXC: Any) -> Any:
    """Four pictures (4, Y, X, C) as one (2Y, 2X, C), row by row."""
    _, height, width, channels = pictures_PYXC.shape
    grid = pictures_PYXC.reshape(GRID, GRID, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(GRID * height, GRID * width, channels)


@dataclass(frozen=True)
class Summary:
    """The scorer's percentages: overall, of broad (L1) and detailed (L2) categories, and the scored grids."""

    overall: float
    broad: dict[str, float]
    detailed: dict[str, float]
    grids: int


_LINE = re.compile(r".*\.\w+((?:, [0-9.eE+-]+)+)")
_HEADS = {"L1 category scores:": "broad", "L2 category scores:": "detailed"}


def summarise(path: Path) -> Summary:
    """Summary of the scorer's result file: a line per grid, then its own tables.

    Raises :class:`ConfigError` where the tables are missing (the scorer did not finish) or numbers are damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    tables: dict[str, dict[str, float]] = {"broad": {}, "detailed": {}}
    overall, grids, current = None, 0, None
    try:
        for line in lines:
            if _LINE.fullmatch(line):
                grids += 1
            elif line in _HEADS:
                current = tables[_HEADS[line]]
            elif line.startswith("\t") and current is not None:
                name, _, value = line.strip().rpartition(": ")
                current[name] = float(value)
            elif line.startswith("DPG-Bench score: "):
                overall = float(line.partition(": ")[2])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if overall is None:
        raise ConfigError(
            f"{path} has no line 'DPG-Bench score': the scorer did not finish, or this is another file"
        )
    return Summary(overall, tables["broad"], tables["detailed"], grids)
