"""Class-balanced images for the ADM suite: generated in pieces by several processes, then joined to one ``.npz``.

Image i has class i mod K and seed ``first_seed`` + i, so that every part of the file is balanced, as the splits of
the Inception score need. A piece that exists on the disk is not generated again.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deco_scale.errors import RunError
from deco_scale.evaluation.npz import write_images
from deco_scale.sampling.generate import GenerateFn, SampleRequest
from deco_scale.sampling.output_dir import encode_npy, write_file

_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """``count`` images of ``size`` (height, width) of ``num_classes`` classes, in pieces of ``piece``."""

    count: int
    num_classes: int
    size: tuple[int, int]
    first_seed: int = 0
    piece: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.first_seed <= _MAX_SEED - self.count:
            raise ValueError(f"first_seed={self.first_seed} must not be negative, nor too large for 64 bits")

    @property
    def num_pieces(self) -> int:
        return -(-self.count // self.piece)

    @property
    def file_name(self) -> str:
        return f"samples_{self.count}x{self.size[0]}x{self.size[1]}x3.npz"

    def requests(self, piece: int) -> list[SampleRequest]:
        """The requests of a piece."""
        numbers = range(piece * self.piece, min((piece + 1) * self.piece, self.count))
        return [SampleRequest(i % self.num_classes, i // self.num_classes, self.first_seed + i) for i in numbers]


def missing_pieces(image_set: ImageSet, folder: Path) -> list[int]:
    """Pieces that are missing or damaged in ``folder``; none if the joined file exists."""
    if (folder / image_set.file_name).is_file():
        return []
    return [i for i in range(image_set.num_pieces) if _read_piece(image_set, folder, i) is None]


def generate_parts(
    generate: GenerateFn, image_set: ImageSet, folder: Path, pieces: Sequence[int], *, on_image: Callable[[], None]
) -> None:
    """Generate ``pieces`` and write each as soon as it is complete; a batch may span two pieces."""
    generated = generate([request for piece in pieces for request in image_set.requests(piece)])
    for piece in pieces:
        images = np.empty((len(image_set.requests(piece)), *image_set.size, 3), np.uint8)
        for image in images:
            _, image[:] = next(generated)
            on_image()
        write_file(_piece_path(folder, piece), encode_npy(images))


def join_pieces(image_set: ImageSet, folder: Path) -> Path:
    """Write the ``.npz``, remove the pieces and return its path; raises :class:`RunError` for a missing piece."""
    path = folder / image_set.file_name
    if path.is_file():
        return path

    def pieces() -> Iterator[Any]:
        for i in range(image_set.num_pieces):
            piece = _read_piece(image_set, folder, i)
            if piece is None:
                raise RunError(f"{_piece_path(folder, i)} is missing or damaged: run the command again")
            yield piece

    write_images(path, (image_set.count, *image_set.size, 3), pieces())
    for i in range(image_set.num_pieces):
        _piece_path(folder, i).unlink()
    return path


def _piece_path(folder: Path, piece: int) -> Path:
    return folder / f"piece_{piece:06d}.npy"


def _read_piece(image_set: ImageSet, folder: Path, piece: int) -> Any | None:
    """A piece mapped into memory; None if it is missing, truncated or of another shape."""
    try:
        piece_images = np.load(_piece_path(folder, piece), mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    shape = (len(image_set.requests(piece)), *image_set.size, 3)
    return piece_images if piece_images.shape == shape and piece_images.dtype == np.uint8 else None
