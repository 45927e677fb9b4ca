"""The ``deco`` command. Exit codes: 0 done, 1 failed, 2 wrong use or configuration.

What many processes can share runs under ``torchrun -m deco_scale.cli.main`` and
``deepspeed --module deco_scale.cli.main``.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from data_pipeline.console import table_console
from data_pipeline.errors import DataError
from deco_scale.errors import ConfigError, RunError
from deco_scale.observability.redact import scrub

COMMANDS = {
    "sample": ("deco_scale.cli.sample", "images from a checkpoint's EMA weights"),
    "evaluate": ("deco_scale.cli.evaluate", "images and scores of the published benchmarks"),
    "spectrum": ("deco_scale.cli.spectrum", "energy per frequency of tokens and velocities"),
    "demo": ("deco_scale.cli.demo", "a page that draws images, in a browser"),
    "plan": ("deco_scale.cli.plan", "layout, memory, time and cost on N GPUs"),
    "watch": ("deco_scale.cli.watch", "a run's progress, faults and goodput in the terminal"),
    "report": ("deco_scale.cli.report", "a run as one self-contained HTML file"),
    "embed": ("deco_scale.cli.embed", "compute the captions' text states before training"),
}
"""Module and help of each subcommand; a module has ``add_arguments(parser)`` and ``run(args, console)``."""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="deco", description=__doc__)
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((a for a in arguments if a in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name == chosen:
            # Only what is used is imported: several commands need packages or seconds of their own.
            command = importlib.import_module(module)
            command.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        return int(command.run(args, table_console()))
    except (ConfigError, RunError, DataError) as error:
        # Under a launcher, wrong use is the same on all ranks and told once per node.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
            print(scrub(f"deco: {error}"), file=sys.stderr)
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
