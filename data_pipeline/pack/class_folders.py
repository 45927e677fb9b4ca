"""A folder of images for each class, as ImageNet comes: read as one stream of samples with class numbers.

A class's number is its folder's place among the sorted names, which for ImageNet's identifiers is the usual one.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.errors import DataError, Reject
from data_pipeline.pack.readers import PackedSample, image_files, make_sample, read_images
from data_pipeline.stream.sampler import generator

_ORDER_KEY = 9


def class_names(root: Path, rejects: list[Reject]) -> list[str]:
    """Sorted names of the folders in ``root``; hidden folders, and files beside them, are added to ``rejects``.

    Raises :class:`DataError` where there is no such folder, or one without images: it would shift the numbers of
    the classes behind it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; classes are folders on a local disk")
    names = []
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.name.startswith("."):
                rejects.append(Reject(entry.path, "hidden"))
            elif entry.is_dir():
                names.append(entry.name)
            else:
                rejects.append(Reject(entry.path, "lies in no class's folder"))
    if not names:
        raise DataError(f"{root}: has no folders; one folder per class is needed")
    for name in names:
        if not name.isprintable():
            raise DataError(f"{root}: {name!r} cannot be the name of a class")
        if next(image_files(root / name), None) is None:
            raise DataError(f"{root / name}: has no images; remove it, or it would count as a class")
    return names


def read_class_folders(
    root: Path, names: Sequence[str], rejects: list[Reject], *, workers: int = 1
) -> Iterator[PackedSample]:
    """Images of all classes in an order that depends on their names alone, labelled by place in ``names``.

    They are mixed, since a run reads neighbours together: sorted, a batch would hold few classes. ``names`` are
    sorted.
    """
    images = [path for name in names for path in image_files(root / name)]
    order = generator(0, _ORDER_KEY).permutation(len(images))

    def labelled(path: Path) -> PackedSample:
        number = bisect.bisect_left(names, path.relative_to(root).parts[0])
        return make_sample(str(path), path.read_bytes(), entries={}, text=None, label=str(number).encode())

    return read_images(labelled, (images[i] for i in order), rejects, workers=workers)
