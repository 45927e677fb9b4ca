"""Results of preflight: checks, each with the problems that refuse the run."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from rich.console import Console
from rich.table import Table

T = TypeVar("T")
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True)
class RankInfo:
    """A process by rank, by its rank on its node, and by the node's name."""

    rank: int
    local_rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class Check(NamedTuple):
    """One check: the value to show, and the problems, each naming a rank and what to do."""

    name: str
    value: str
    problems: Sequence[str] = ()


Report = Mapping[str, Sequence[Check]]
"""Checks by the title of their table."""


def problems_by_rank(
    ranks: Iterable[RankInfo], values: Iterable[T], describe: Callable[[T], str | None]
) -> list[str]:
    """``describe`` of each rank's value, behind the rank's name, where it is not None."""
    described = ((rank, describe(value)) for rank, value in zip(ranks, values, strict=True))
    return [f"{rank}: {problem}" for rank, problem in described if problem is not None]


def check_same(facts: Sequence[Mapping[str, str]], ranks: Sequence[RankInfo], *, advice: str) -> list[Check]:
    """A check for each fact; ranks whose value is not the most common one (of equals, rank 0's) are named."""
    checks = []
    for name in dict.fromkeys(name for each in facts for name in each):
        values = [each.get(name, "missing") for each in facts]
        # Counter keeps the order of first occurrence among equals.
        common = Counter(values).most_common(1)[0][0]
        problems = []
        for value in dict.fromkeys(value for value in values if value != common):
            outliers = [str(rank) for rank, v in zip(ranks, values, strict=True) if v == value]
            more = f" and {len(outliers) - _MAX_NAMED} more" if len(outliers) > _MAX_NAMED else ""
            named = ", ".join(outliers[:_MAX_NAMED]) + more
            problems.append(f"{named}: {name} is {value}, elsewhere {common}; {advice}")
        checks.append(Check(name, common, problems))
    return checks


def format_range(values: Sequence[float], ranks: Sequence[RankInfo], unit: str) -> str:
    """Minimum and maximum of measured values, with their ranks where there are several."""
    if len(values) == 1:
        return f"{values[0]:.3g} {unit}"
    low, high = min(range(len(values)), key=values.__getitem__), max(range(len(values)), key=values.__getitem__)
    return f"{values[low]:.3g} ({ranks[low]}) to {values[high]:.3g} {unit} ({ranks[high]})"


def all_problems(report: Report) -> list[str]:
    return [problem for checks in report.values() for check in checks for problem in check.problems]


def write_report(report: Report, log: Path, console: Console) -> None:
    """A table of each group on the console, and the same as plain lines with the problems added to ``log``."""
    lines = []
    for title, checks in report.items():
        table = Table("check", "value", "", title=title, title_justify="left")
        for check in checks:
            verdict = "refused" if check.problems else "ok"
            table.add_row(check.name, check.value, f"[red]{verdict}[/red]" if check.problems else verdict)
            lines.append(f"{title}: {check.name}: {check.value}: {verdict}")
            lines += [f"  {problem}" for problem in check.problems]
        console.print(table)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        with log.open("a", encoding="utf-8") as file:
            file.writelines(f"{stamp} {line}\n" for line in lines)
    except OSError as error:
        console.print(f"{log.name} was not written: {error.strerror}", highlight=False)
