"""Class-balanced pictures for the ADM suite: drawn in pieces that several processes share, then one ``.npz``.

Picture i is of class i mod K with seed ``first_seed`` + i, so that every stretch of the file is balanced, as the
splits of the Inception score need. A piece that lies on the disk is not drawn again.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deco_scale.errors import RunError
from deco_scale.evaluation.files import write_whole
from deco_scale.evaluation.npz import write_images
from deco_scale.sampling.generate import SampleRequest

PicturesFn = Callable[[Sequence[SampleRequest]], Iterator[tuple[SampleRequest, Any]]]
"""Jobs to (job, uint8 picture (Y, X, 3)) in their order; a generator's ``pictures`` with its options set."""

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """``count`` pictures of ``size`` (height, width) of ``num_classes`` classes, in pieces of ``piece``."""

    count: int
    num_classes: int
    size: tuple[int, int]
    first_seed: int = 0
    piece: int = 256

    def __post_init__(self) -> None:
        if min(self.count, self.num_classes, self.piece) < 1:
            raise ValueError(
                f"count={self.count}, num_classes={self.num_classes}, piece={self.piece} must be at least 1"
            )
        if not 0 <= self.first_seed <= _MAX_SEED - self.count:
            raise ValueError(f"first_seed={self.first_seed} must not be negative, nor too large for 64 bits")

    @property
    def num_pieces(self) -> int:
        return -(-self.count // self.piece)

    @property
    def file_name(self) -> str:
        return f"samples_{self.count}x{self.size[0]}x{self.size[1]}x3.npz"

    def jobs(self, piece: int) -> list[SampleRequest]:
        """The jobs of a piece."""
        numbers = range(piece * self.piece, min((piece + 1) * self.piece, self.count))
        return [SampleRequest(i % self.num_classes, i // self.num_classes, self.first_seed + i) for i in numbers]


def missing_pieces(pictures: ImageSet, folder: Path) -> list[int]:
    """Pieces that ``folder`` does not hold whole; none where the finished file is there."""
    if (folder / pictures.file_name).is_file():
        return []
    return [i for i in range(pictures.num_pieces) if _read_piece(pictures, folder, i) is None]


def generate_parts(
    draw: PicturesFn, pictures: ImageSet, folder: Path, pieces: Sequence[int], *, on_picture: Callable[[], None]
) -> None:
    """Draw ``pieces`` and write each as soon as it is whole; batches may reach over their borders."""
    drawn = draw([job for piece in pieces for job in pictures.jobs(piece)])
    for piece in pieces:
        whole = np.empty((len(pictures.jobs(piece)), *pictures.size, 3), np.uint8)
        for row in whole:
            _, row[:] = next(drawn)
            on_picture()
        buffer = io.BytesIO()
        np.save(buffer, whole, allow_pickle=False)
        write_whole(_piece_path(folder, piece), buffer.getvalue(), scratch=folder)


def join_pieces(pictures: ImageSet, folder: Path) -> Path:
    """Write the ``.npz`` from all pieces and remove them; its path. A missing piece is a :class:`RunError`."""
    path = folder / pictures.file_name
    if path.is_file():
        return path

    def whole() -> Iterator[Any]:
        for i in range(pictures.num_pieces):
            piece = _read_piece(pictures, folder, i)
            if piece is None:
                raise RunError(f"{_piece_path(folder, i)} is missing or damaged: run the command again")
            yield piece

    write_images(path, (pictures.count, *pictures.size, 3), whole())
    for i in range(pictures.num_pieces):
        _piece_path(folder, i).unlink()
    return path


def _piece_path(folder: Path, piece: int) -> Path:
    return folder / f"piece_{piece:06d}.npy"


def _read_piece(pictures: ImageSet, folder: Path, piece: int) -> Any | None:
    """A piece mapped into memory; None where it is missing, cut or of another shape."""
    try:
        found = np.load(_piece_path(folder, piece), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    shape = (len(pictures.jobs(piece)), *pictures.size, 3)
    return found if found.shape == shape and found.dtype == np.uint8 else None
