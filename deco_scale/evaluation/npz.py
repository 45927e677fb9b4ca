"""``.npz`` files of images and statistics, streamed.

A file of 50,000 images of 256 pixels has 9.8 GB: one array ``arr_0`` in uint8, (P, Y, X, 3), the layout of the ADM
suite. Nothing is unpickled; an array of another dtype or shape is refused before it is read.
"""

import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np

from data_pipeline.storage.files import atomic_path
from deco_scale.errors import RunError

IMAGES_KEY = "arr_0"


def write_images(path: Path, shape: tuple[int, int, int, int], pieces: Iterable[Any]) -> None:
    """Write ``arr_0`` of ``shape`` from ``pieces`` (p, Y, X, 3) in order, atomically.

    The same images give the same bytes. Raises ``ValueError`` if the pieces do not add up to the shape,
    :class:`RunError` if the disk refuses.
    """
    written = 0
    try:
        with (
            atomic_path(path) as partial,
            zipfile.ZipFile(partial, "w") as archive,
            archive.open(f"{IMAGES_KEY}.npy", "w", force_zip64=True) as member,
        ):
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)
            for piece in pieces:
                if piece.dtype != np.uint8 or piece.shape[1:] != shape[1:]:
                    raise ValueError(f"{piece.dtype} {piece.shape} in a file of uint8 {shape}")
                member.write(np.ascontiguousarray(piece).data.cast("B"))
                written += len(piece)
            if written != shape[0]:
                raise ValueError(f"{written} images in a file of {shape[0]}")
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error


def array_names(path: Path) -> list[str]:
    """Names of the arrays of a file; raises :class:`RunError` if it is not an ``.npz``."""
    with _archive(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]


def read_floats(path: Path, name: str, shape: tuple[int, ...]) -> Any:
    """Array ``name`` in float64; raises :class:`RunError` if it has another shape or no float dtype."""
    with _member(path, name) as (member, actual, dtype):
        if actual != shape or dtype.kind != "f" or dtype.itemsize > 8:
            raise RunError(f"{path}: {name} is {dtype} {actual}, expected floats {shape}")
        raw = _read(member, prod(shape) * dtype.itemsize, path, name)
        return np.frombuffer(raw, dtype).reshape(shape).astype(np.float64)


def images_shape(path: Path) -> tuple[int, int, int, int]:
    """Shape (P, Y, X, 3) of a file's images; raises :class:`RunError` if it has none in uint8."""
    with _member(path, IMAGES_KEY) as (_, shape, dtype):
        return _checked(path, shape, dtype)


def read_images(path: Path, batch: int) -> Iterator[Any]:
    """Images (p, Y, X, 3) in order, ``batch`` at a time; raises :class:`RunError` for a damaged file."""
    with _member(path, IMAGES_KEY) as (member, actual, dtype):
        count, *rest = _checked(path, actual, dtype)
        for start in range(0, count, batch):
            size = min(batch, count - start)
            raw = _read(member, size * prod(rest), path, IMAGES_KEY)
            yield np.frombuffer(raw, np.uint8).reshape(size, *rest)


def _checked(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> tuple[int, int, int, int]:
    if len(shape) != 4 or shape[3] != 3 or min(shape) < 1 or dtype != np.uint8:
        raise RunError(
            f"{path}: {IMAGES_KEY} is {dtype} {tuple(shape)}, expected uint8 (images, height, width, 3)"
        )
    return shape[0], shape[1], shape[2], shape[3]


@contextmanager
def _archive(path: Path, what: str = "") -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except RunError:
        raise
    except Exception as error:  # zipfile and numpy raise many kinds for damaged files
        raise RunError(f"{path} is damaged, missing or no .npz file: {what}{error}") from error


@contextmanager
def _member(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype[Any]]]:
    """An array's bytes, shape and dtype."""
    with _archive(path, f"{name}: ") as archive:
        if f"{name}.npy" not in archive.namelist():
            raise RunError(f"{path} has no array {name}; it has {', '.join(archive.namelist()[:8])}")
        with archive.open(f"{name}.npy") as member:
            if np.lib.format.read_magic(member) == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
            else:
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
            if fortran or dtype.hasobject:
                raise RunError(f"{path}: {name} is in Fortran order or has objects; save it as a plain array")
            yield member, shape, dtype


def _read(member: IO[bytes], size: int, path: Path, name: str) -> bytes:
    """Exactly ``size`` bytes."""
    data = member.read(size)
    if len(data) < size:
        raise RunError(f"{path}: {name} ends after {len(data)} of {size} bytes")
    return data
