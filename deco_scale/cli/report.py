"""``deco report``: a run's folder as one HTML file that can be sent around."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from deco_scale.errors import ConfigError
from deco_scale.evaluation.files import write_whole
from deco_scale.observability.html_report import render_report
from deco_scale.observability.run_dir import RunDir


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Writes curves, sample images over time, events, layout, settings, goodput and costs into one file that "
        "loads nothing and runs no script. Values that look like secrets are left out."
    )
    parser.add_argument("run", type=Path, help="run.dir of the configuration")
    parser.add_argument("--out", type=Path, help="default: report.html in the run's folder")
    parser.add_argument("--usd-per-gpu-hour", type=float, help="price, for the costs")


def run(args: argparse.Namespace, console: Console) -> int:
    """Write the page and say where it is."""
    if not args.run.is_dir():
        raise ConfigError(f"{args.run}: no such folder; give the run.dir of a configuration")
    if args.usd_per_gpu_hour is not None and not 0 < args.usd_per_gpu_hour < float("inf"):
        raise ConfigError(f"--usd-per-gpu-hour {args.usd_per_gpu_hour} must be positive")
    run_dir = RunDir(args.run)
    run_dir.refresh()
    text = render_report(run_dir, now=time.time(), usd_per_gpu_hour=args.usd_per_gpu_hour)
    out, data = args.out or args.run / "report.html", text.encode()
    write_whole(out, data, scratch=out.parent)
    console.print(f"report of {args.run}: {out} ({len(data) / 1e6:.2f} MB)", markup=False, soft_wrap=True)
    return 0
