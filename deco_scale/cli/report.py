"""``deco report``: a run's folder as one self-contained HTML file."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from data_pipeline.console import positive, print_line
from data_pipeline.storage.files import atomic_write
from deco_scale.errors import ConfigError, RunError
from deco_scale.observability.html_report import render_report
from deco_scale.observability.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes curves, sample images over time, events, layout, settings, goodput and costs into one file that "
        "loads nothing and runs no script. Values that look like secrets are left out."
    )
    parser.add_argument("run", type=Path, help="run.dir of the configuration")
    parser.add_argument("--out", type=Path, help="default: report.html in the run's folder")
    parser.add_argument("--usd-per-gpu-hour", type=positive, help="price, for the costs")


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the page and print its path."""
    if not args.run.is_dir():
        raise ConfigError(f"{args.run}: no such folder; give the run.dir of a configuration")
    run_dir = RunDir(args.run).refresh()
    text = render_report(run_dir, now=time.time(), usd_per_gpu_hour=args.usd_per_gpu_hour)
    out, data = args.out or args.run / "report.html", text.encode()
    try:
        atomic_write(out, data, shared=True)
    except OSError as error:
        raise RunError(f"{out}: {error.strerror}") from error
    print_line(console, f"report of {args.run}: {out} ({len(data) / 1e6:.2f} MB)")
    return 0
