"""A folder of pictures for each class, as ImageNet comes: read as one stream of samples with class numbers.

A class's number is its folder's place among the sorted names, which for ImageNet's identifiers is the usual one.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.pack.readers import RawSample, make_sample, pictures_below, read_pictures
from data_pipeline.stream.sampler import generator

_ORDER_KEY = 9


def class_names(root: Path, skipped: list[str]) -> list[str]:
    """Sorted names of the folders in ``root``; hidden ones and pictures beside them go to ``skipped``.

    Raises :class:`DataError` where there is no such folder, or one without pictures: it would shift the numbers of
    the classes behind it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; classes are folders on a local disk")
    names = []
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                skipped.append(f"{entry.path}: hidden")
            elif entry.is_dir():
                names.append(entry.name)
            else:
                skipped.append(f"{entry.path}: lies in no class's folder")
    if not names:
        raise DataError(f"{root}: holds no folders; a folder for each class is needed")
    for name in names:
        if not name.isprintable():
            raise DataError(f"{root}: {name!r} cannot be the name of a class")
        if next(pictures_below(root / name), None) is None:
            raise DataError(f"{root / name}: holds no pictures; remove it, or it would count as a class")
    return names


def read_class_folders(
    root: Path, names: Sequence[str], skipped: list[str], *, workers: int = 1
) -> Iterator[RawSample]:
    """Pictures of all classes in an order that depends on their names alone, labelled by place in ``names``.

    They are mixed, since a run reads neighbours together: sorted, a batch would hold few classes. ``names`` are
    sorted.
    """
    pictures = [path for name in names for path in pictures_below(root / name)]
    order = generator(0, _ORDER_KEY).permutation(len(pictures))

    def labelled(path: Path) -> RawSample:
        number = bisect.bisect_left(names, path.relative_to(root).parts[0])
        return make_sample(str(path), path.read_bytes(), entries={}, text=None, label=str(number).encode())

    return read_pictures(labelled, (pictures[i] for i in order), skipped, workers=workers)
