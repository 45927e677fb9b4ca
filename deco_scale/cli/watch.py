"""``deco watch``: a live view of a run's folder in the terminal."""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from data_pipeline.console import print_line
from deco_scale.errors import ConfigError
from deco_scale.observability.run_dir import RunDir
from deco_scale.observability.summary import ASCII_BARS, BARS, Row, summary_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Shows loss, speed, faults, the last checkpoint, the remaining time and where the time went. Read-only; "
        "Ctrl-C ends the view, not the run."
    )
    parser.add_argument("run", type=Path, help="run.dir of the configuration")
    parser.add_argument("--once", action="store_true", help="print once and exit")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between updates")


def run(args: argparse.Namespace, console: Console) -> int:
    """Show the run until interrupted, or once."""
    if not args.every >= 0.1:
        raise ConfigError(f"--every {args.every} must be at least 0.1 seconds")
    if not args.run.is_dir() and (args.once or args.run.exists()):
        raise ConfigError(f"{args.run}: no such folder; give the run.dir of a configuration")
    run_dir = RunDir(args.run)
    if args.once:
        _print(_refresh(run_dir, console), console)
    elif console.is_terminal:
        _live(run_dir, console, args.every)
    else:
        _lines(run_dir, console, args.every)
    return 0


def _refresh(run_dir: RunDir, console: Console) -> list[Row]:
    run_dir.refresh()
    bars = BARS if console.is_terminal and console.encoding.lower().startswith("utf") else ASCII_BARS
    return summary_rows(run_dir, now=time.time(), bars=bars)


def _panel(rows: list[Row]) -> Panel:
    table = Table.grid(padding=(0, 2))
    for label, value in rows:
        style = "bold red" if label == "problem" or (label == "faults" and value != "none") else ""
        table.add_row(Text(label, style="dim"), Text(value, style=style))
    return Panel(table, title="deco watch", title_align="left")


def _print(rows: list[Row], console: Console) -> None:
    """A panel on a terminal, elsewhere one line per row."""
    if console.is_terminal:
        console.print(_panel(rows))
        return
    for label, value in rows:
        print_line(console, f"{label}: {value}")


def _live(run_dir: RunDir, console: Console, every: float) -> None:
    with Live(_panel(_refresh(run_dir, console)), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(every)
            live.update(_panel(_refresh(run_dir, console)), refresh=True)


def _lines(run_dir: RunDir, console: Console, every: float) -> None:
    """Without a terminal, print all rows each time that a file has grown."""
    previous = None
    while True:
        rows = _refresh(run_dir, console)
        size = (len(run_dir.metrics), len(run_dir.events), run_dir.quarantined)
        if size != previous:
            _print(rows, console)
            previous = size
        time.sleep(every)
