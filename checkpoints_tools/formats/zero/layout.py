"""Positions of each parameter's elements in DeepSpeed's ZeRO partitions: plain arithmetic, no files.

A group is a list of parameters that share flat buffers. ZeRO-1/2 flatten a group, pad it to a multiple of twice
the ranks and cut it into equal partitions. ZeRO-3 cuts each parameter into equal partitions, the last ones padded,
and a rank's flat buffer is its partitions one after another
(``deepspeed/runtime/zero/stage_1_and_2.py`` and ``stage3.py`` of DeepSpeed 0.19).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from deco_scale.models.stored_names import part_of
from deco_scale.models.tp_plan import split_dim

Shape = tuple[int, ...]
ALIGNMENT = 2
"""ZeRO-1/2 pad a group to a multiple of this times the ranks."""
SUB_GROUP_ELEMENTS = 10**9
"""ZeRO-3 starts a new group once a rank's partitions reach so many elements (DeepSpeed's default)."""


@dataclass(frozen=True, slots=True)
class Extent:
    """``count`` elements of a flattened parameter, from ``first``: at ``start`` of a rank's flat of a group."""

    rank: int
    group: int
    start: int
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class Partitions:
    """``sizes[group]``: elements of a rank's padded flat; ``used[rank][group]``: those that are not padding.

    Under ZeRO-3 the padding lies between parameters, and ``used`` equals ``sizes``.
    """

    sizes: list[int]
    used: list[list[int]]
    extents: dict[str, list[Extent]]


def partitions(groups: Sequence[Mapping[str, Shape]], *, dp: int, stage: int) -> Partitions:
    """The partitions of the parameters of ``groups``, in order, over ``dp`` ranks under ZeRO ``stage``."""
    partition = _by_parameter if stage == 3 else _flat_groups
    return partition(groups, dp)


def sub_groups(shapes: Mapping[str, Shape], *, dp: int, stage: int) -> list[dict[str, Shape]]:
    """One optimizer group as DeepSpeed groups it: under ZeRO-3 large models have several groups."""
    groups: list[dict[str, Shape]] = [{}]
    size = 0
    total = sum(_share(shape, dp) for shape in shapes.values())
    for name, shape in shapes.items():
        if stage == 3 and size >= SUB_GROUP_ELEMENTS and total > SUB_GROUP_ELEMENTS:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += _share(shape, dp)
    return groups


def joined_shapes(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """Shapes of the module's parameters, which may hold several stored tensors, in order."""
    shapes: dict[str, Shape] = {}
    for name, shape in stored.items():
        parameter, _, _ = part_of(name)
        shapes[parameter] = (shapes[parameter][0] + shape[0], *shape[1:]) if parameter in shapes else shape
    return shapes


def tp_shape(name: str, full: Shape, tp: int) -> Shape:
    """Shape of a tp rank's part of a parameter."""
    dim = split_dim(name)
    return full if dim is None else (*full[:dim], full[dim] // tp, *full[dim + 1 :])


def full_shape(name: str, part: Shape, tp: int) -> Shape:
    """Shape of a parameter from that of a tp rank's part."""
    dim = split_dim(name)
    if dim is None or dim >= len(part):
        return part
    return (*part[:dim], part[dim] * tp, *part[dim + 1 :])


def overlaps(extents: Sequence[Extent], first: int, count: int) -> list[Extent]:
    """The parts of ``extents`` that hold the elements from ``first`` on, in order of the elements."""
    parts = []
    for extent in extents:
        start, end = max(extent.first, first), min(extent.first + extent.count, first + count)
        if start < end:
            offset = extent.start + start - extent.first
            parts.append(Extent(extent.rank, extent.group, offset, start, end - start))
    return parts


def _flat_groups(groups: Sequence[Mapping[str, Shape]], dp: int) -> Partitions:
    sizes, used = [], [[0] * len(groups) for _ in range(dp)]
    extents: dict[str, list[Extent]] = {}
    for group, shapes in enumerate(groups):
        total = sum(prod(shape) for shape in shapes.values())
        size = -(-total // (ALIGNMENT * dp)) * ALIGNMENT
        sizes.append(size)
        for rank in range(dp):
            used[rank][group] = min(size, max(0, total - rank * size))
        offset = 0
        for name, shape in shapes.items():
            end, first = offset + prod(shape), offset
            extents[name] = []
            while first < end:
                rank, start = divmod(first, size)
                count = min(end - first, size - start)
                extents[name].append(Extent(rank, group, start, first - offset, count))
                first += count
            offset = end
    return Partitions(sizes, used, extents)


def _by_parameter(groups: Sequence[Mapping[str, Shape]], dp: int) -> Partitions:
    sizes = []
    extents: dict[str, list[Extent]] = {}
    for group, shapes in enumerate(groups):
        start = 0
        for name, shape in shapes.items():
            share, numel = _share(shape, dp), prod(shape)
            extents[name] = [
                Extent(rank, group, start, rank * share, min(share, numel - rank * share))
                for rank in range(dp)
                if rank * share < numel
            ]
            start += share
        sizes.append(start)
    return Partitions(sizes, [list(sizes) for _ in range(dp)], extents)


def _share(shape: Shape, dp: int) -> int:
    return -(-prod(shape) // dp)
