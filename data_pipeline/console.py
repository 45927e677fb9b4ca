"""What the command lines share: argument types, messages, lists of problems and a progress bar."""

import os
import sys
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from data_pipeline.text import printable

LISTED = 20
"""Items listed by name; the rest are counted."""


class Parser(ArgumentParser):
    """Prints one line for wrong arguments and exits with 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog.split()[0]}: {message}\n")


class RenamedOption(Action):
    """Accepts an option's old name with a notice; ``dest`` is that of the new one."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: object, option: str | None = None
    ) -> None:
        print(f"{parser.prog}: {option} is now called --{self.dest.replace('_', '-')}", file=sys.stderr)
        setattr(namespace, self.dest, values)


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ArgumentTypeError(f"{text} is not at least 1")
    return value


def positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ArgumentTypeError(f"{text} is not above 0")
    return value


def default_workers(limit: int) -> int:
    """The cores this process may use, up to ``limit``: machines with many cores are shared with other jobs."""
    return min(limit, len(os.sched_getaffinity(0)))


def table_console() -> Console:
    """A console with a terminal's own width; elsewhere wide enough for tables."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def cell(text: object) -> str:
    """Text for a table of rich: neither control characters nor markup."""
    return escape(printable(text))


def print_line(console: Console, text: str) -> None:
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def print_list(console: Console, title: str, items: Sequence[object]) -> None:
    """How many there are and the first of them; nothing for an empty list."""
    if items:
        print_line(console, f"{len(items):,} {title}:")
        for item in items[:LISTED]:
            print_line(console, f"  {item}")
        if len(items) > LISTED:
            print_line(console, f"  and {len(items) - LISTED:,} more")


def print_error(program: str, error: object, code: int) -> int:
    """One line on standard error; returns ``code``."""
    print(f"{program}: {printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code


@contextmanager
def progress_bar(
    console: Console, title: str, total: int | None = None, *, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """A bar that is gone when it is done; yields ``update(name)``, or ``update(name, completed, total)``."""
    times, name = (bars.TimeElapsedColumn(), bars.TimeRemainingColumn()), bars.TextColumn("{task.fields[name]}")
    columns = (bars.TextColumn(title), bars.BarColumn(), bars.MofNCompleteColumn(), *times, name)
    hidden = not (enabled and console.is_terminal)
    with bars.Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=total, name="")

        def update(name: str = "", completed: int | None = None, total: int | None = None) -> None:
            advance = 1 if completed is None else None
            progress.update(task, advance=advance, completed=completed, total=total, name=cell(name))

        yield update
