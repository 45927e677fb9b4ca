"""The ``deco`` command. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration.

Commands that run on several processes are started by ``torchrun -m deco_scale.cli`` or
``deepspeed --module deco_scale.cli``.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from data_pipeline.console import Parser, print_error, table_console
from data_pipeline.errors import DataError
from deco_scale.errors import ConfigError, RunError
from deco_scale.observability.redact import scrub

COMMANDS = {
    "sample": ("deco_scale.cli.sample", "generate images with a checkpoint's EMA weights"),
    "evaluate": ("deco_scale.cli.evaluate", "generate images for the published benchmarks, and score them"),
    "spectrum": ("deco_scale.cli.spectrum", "energy per frequency of tokens and velocities"),
    "demo": ("deco_scale.cli.demo", "a web page that generates images"),
    "plan": ("deco_scale.cli.plan", "layout, memory, time and cost on N GPUs"),
    "watch": ("deco_scale.cli.watch", "a run's progress, faults and goodput in the terminal"),
    "report": ("deco_scale.cli.report", "a run as one self-contained HTML file"),
    "embed": ("deco_scale.cli.embed", "compute the captions' text embeddings before training"),
}
"""Module and help of each subcommand; a module has ``add_arguments(parser)`` and ``run(args, console)``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="deco", description=__doc__)
    # The deepspeed launcher passes it; the environment has the same value.
    parser.add_argument("--local_rank", type=int, default=None, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    chosen = next((a for a in arguments if a in COMMANDS), None)
    for name, (module, text) in COMMANDS.items():
        subparser = commands.add_parser(name, help=text)
        if name == chosen:
            # Import only what is used: several commands need packages or seconds of their own.
            command = importlib.import_module(module)
            command.add_arguments(subparser)
    args = parser.parse_args(arguments)
    try:
        return int(command.run(args, table_console()))
    except (ConfigError, RunError, DataError) as error:
        code = getattr(error, "exit_code", 1)
        # Wrong use is the same on all ranks: print it once per node.
        if os.environ.get("LOCAL_RANK", "0") == "0" or not isinstance(error, ConfigError):
            print_error("deco", scrub(str(error)), code)
        return code
    except KeyboardInterrupt:
        return 130
