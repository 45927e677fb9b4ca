"""Files that appear whole or not at all, and the settings that a folder of results was made with."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from data_pipeline.storage.files import atomic_write
from deco_scale.errors import ConfigError, RunError

SETTINGS = "settings.json"


def write_whole(path: Path, data: bytes, *, scratch: Path) -> None:
    """Write to a hidden file in ``scratch`` (same file system), make it durable, rename it to ``path``.

    Folders are created. Raises :class:`RunError` where the disk refuses.
    """
    try:
        atomic_write(path, data, scratch=scratch, shared=True)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error


def write_png(path: Path, pixels_YXC: Any, *, scratch: Path) -> None:
    """One uint8 picture (Y, X, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels_YXC).save(buffer, format="PNG")
    write_whole(path, buffer.getvalue(), scratch=scratch)


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Note the settings in ``settings.json``, or check that the folder was begun with the same.

    Raises :class:`ConfigError` that names what differs, so that one folder never mixes two models or samplers.
    """
    plain = json.loads(json.dumps(settings))
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return write_whole(path, json.dumps(plain, indent=1).encode(), scratch=folder)
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}); take another --out folder") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is not a table of settings; take another --out folder")
    differs = [
        f"{key} {found.get(key)!r} (now {plain.get(key)!r})"
        for key in sorted(found.keys() | plain.keys())
        if found.get(key) != plain.get(key)
    ]
    if differs:
        raise ConfigError(f"{folder} was begun with other settings: {', '.join(differs)}; take another --out")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object a line; raises :class:`ConfigError` naming the line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        found.append(entry)
    return found
