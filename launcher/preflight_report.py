"""What preflight found: groups of rows, each row with the problems that refuse the run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

T = TypeVar("T")
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A process by rank, by its number on its node, and by the node's name."""

    rank: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True, slots=True)
class Row:
    """One check: what was found, and the problems, each naming a place and what to do."""

    check: str
    value: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    title: str
    rows: tuple[Row, ...]


def gathered(value: T) -> list[T]:
    """The values of all ranks, on all ranks."""
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def listed(places: Sequence[Place]) -> str:
    """Names of places, the first few of many."""
    names = ", ".join(map(str, places[:_SHOWN]))
    return names if len(places) <= _SHOWN else f"{names} and {len(places) - _SHOWN} more"


def same_everywhere(
    facts: Sequence[Mapping[str, str]], places: Sequence[Place], *, advice: str
) -> tuple[Row, ...]:
    """A row for each fact; named are ranks whose value is not the most common one (of equals, rank 0's)."""
    rows = []
    for name in dict.fromkeys(name for found in facts for name in found):
        values = [found.get(name, "missing") for found in facts]
        count = Counter(values)
        most = max(count.values())
        common = values[0] if count[values[0]] == most else count.most_common(1)[0][0]
        problems = []
        for value in dict.fromkeys(v for v in values if v != common):
            odd = [place for place, v in zip(places, values, strict=True) if v == value]
            problems.append(f"{listed(odd)}: {name} is {value}, elsewhere {common}; {advice}")
        rows.append(Row(name, common, tuple(problems)))
    return tuple(rows)


def span(values: Sequence[float], places: Sequence[Place], unit: str) -> str:
    """Least and greatest of measured values, with their places where they differ."""
    low, high = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    if len(values) == 1:
        return f"{values[0]:.3g} {unit}"
    return f"{values[low]:.3g} ({places[low]}) to {values[high]:.3g} {unit} ({places[high]})"


def problems_of(groups: Sequence[Group]) -> list[str]:
    return [problem for group in groups for row in group.rows for problem in row.problems]


def show(group: Group, console: Console) -> None:
    """One table; problems in full below their row."""
    table = Table("check", "found", "", title=group.title, title_justify="left")
    for row in group.rows:
        table.add_row(row.check, row.value, "[red]refused[/red]" if row.problems else "ok")
    console.print(table)


def lines_of(groups: Sequence[Group]) -> list[str]:
    """The same as plain lines, for a log."""
    lines = []
    for group in groups:
        for row in group.rows:
            lines.append(f"{group.title}: {row.check}: {row.value}: {'refused' if row.problems else 'ok'}")
            lines += [f"  {problem}" for problem in row.problems]
    return lines
