"""Prompts from files: one per line of a text file, or one file per prompt in a folder or tar."""

import gzip
import io
import re
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from deco_scale.errors import ConfigError

MAX_PROMPT_BYTES = 1 << 20
MAX_TAR_BYTES = 1 << 26
_ID = re.compile(r"[A-Za-z0-9_-]+")


class NamedPrompt(NamedTuple):
    """``id`` is the file's name without ``.txt``, ``text`` its first line."""

    id: str
    text: str


def read_lines(path: Path, option: str = "") -> list[str]:
    """Lines of a text file; raises :class:`ConfigError`, which names ``option``, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{option} {path}: {error}".lstrip()) from error


def read_prompts(path: Path, option: str = "--prompts") -> list[str]:
    """One prompt per line without empty ones; raises :class:`ConfigError` as above, or if there is none."""
    prompts = [line.strip() for line in read_lines(path, option) if line.strip()]
    if not prompts:
        raise ConfigError(f"{option} {path}: no prompt in it")
    return prompts


def read_named_prompts(path: Path) -> list[NamedPrompt]:
    """Prompts of a folder or tar (plain or gzip) of ``<id>.txt``, sorted by id.

    Nothing is extracted to the disk. Raises :class:`ConfigError` for a tar with links, absolute paths or ``..``,
    files over 1 MiB or more than 64 MiB in total, an id with other characters than letters, digits, - and _, and a
    text that is empty or not UTF-8.
    """
    prompts: dict[str, str] = {}
    try:
        for name, data in _folder_files(path) if path.is_dir() else _tar_files(path):
            key = name.rsplit("/", 1)[-1].removesuffix(".txt")
            if not _ID.fullmatch(key):
                raise ConfigError(f"{path}: {name}: an id may have letters, digits, - and _ only")
            if key in prompts:
                raise ConfigError(f"{path}: {name}: duplicate id {key}")
            try:
                prompts[key] = data.decode("utf-8").strip().split("\n")[0].strip()
            except UnicodeDecodeError as error:
                raise ConfigError(f"{path}: {name} is not UTF-8 text") from error
            if not prompts[key]:
                raise ConfigError(f"{path}: {name} is empty")
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ConfigError(f"{path}: not a folder or tar of prompts: {error}") from error
    if not prompts:
        raise ConfigError(f"{path}: no .txt file in it")
    return [NamedPrompt(*item) for item in sorted(prompts.items())]


def _folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    for file in sorted(path.glob("*.txt")):
        if file.name.startswith("."):
            continue
        if file.stat().st_size > MAX_PROMPT_BYTES:
            raise ConfigError(f"{file} has over {MAX_PROMPT_BYTES} bytes: not a prompt")
        yield file.name, file.read_bytes()


def _tar_files(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        is_gzip = file.peek(2)[:2] == b"\x1f\x8b"
        # A small gzip may expand to any size.
        data = (gzip.GzipFile(fileobj=file) if is_gzip else file).read(MAX_TAR_BYTES + 1)
    if len(data) > MAX_TAR_BYTES:
        raise ConfigError(f"{path} expands to more than {MAX_TAR_BYTES} bytes: not a set of prompts")
    with tarfile.open(fileobj=io.BytesIO(data), mode="r|") as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.name.startswith("/") or ".." in parts or "\\" in member.name:
                raise ConfigError(f"{path}: {member.name!r} points outside the tar; not a set of prompts")
            if member.isdir():
                continue
            if not member.isreg():
                raise ConfigError(f"{path}: {member.name!r} is a link or device; not a set of prompts")
            if member.size > MAX_PROMPT_BYTES:
                raise ConfigError(f"{path}: {member.name!r} has {member.size} bytes: not a prompt")
            content = tar.extractfile(member)
            # macOS adds a ._ file beside each one.
            if content is not None and parts[-1].endswith(".txt") and not parts[-1].startswith("."):
                yield member.name, content.read()
