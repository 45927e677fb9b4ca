"""The ``deco-ckpt`` command: inspect, verify, diff, import, export, reshard, average.

Exit codes: 0 done, 1 a check failed or the disk cannot be written, 2 wrong usage or an unreadable checkpoint.
"""

import argparse
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from checkpoints_tools.average import plan_average
from checkpoints_tools.base import SETS, CheckpointReader, Plan, TensorSpec, refuse_existing
from checkpoints_tools.convert import plan_export, plan_import
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.memory_budget import use_large_pages
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import DEFAULT_FILES, DEFAULT_MEMORY, byte_count, plan_reshard
from checkpoints_tools.tensor_stats import difference, differences_table, facts_table, tensor_facts, tensors_table
from checkpoints_tools.verify import has_checksums, problems_of
from data_pipeline.console import (
    Parser,
    cell,
    default_workers,
    positive_int,
    print_error,
    print_line,
    print_list,
    progress_bar,
)
from deco_scale.checkpoint.format import verify
from deco_scale.config import load_config
from deco_scale.errors import ConfigError, RunError

MAX_WORKERS = 8
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Result = TypeVar("Result")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    use_large_pages()
    try:
        return int(args.run(args, Console()))
    except (ConfigError, RunError) as error:
        return print_error("deco-ckpt", error, error.exit_code)
    except OSError as error:
        return print_error("deco-ckpt", f"{error.filename or ''}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="deco-ckpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., int], paths: str, help: str) -> Callable[..., argparse.Action]:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        for path in paths.split():
            sub.add_argument(path.rstrip("+"), type=Path, nargs="+" if path.endswith("+") else None)
        return sub.add_argument

    option = command("inspect", _inspect, "path", "show a checkpoint's contents; exit code 1 if it contains NaN")
    option("--tensors", action="store_true", help="a line with statistics for each tensor")
    command("verify", _verify, "path", "compare checksums, index and the weights' digest")
    text = "compare two checkpoints of any formats; exit code 1 if they differ"
    option = command("diff", _diff, "first second", text)
    option("--only", choices=SETS, help="compare one set of tensors")
    option("--tolerance", type=_not_negative, default=0.0, help="allowed absolute difference")
    option = command(
        "import",
        _import,
        "source target",
        "convert the release's weights or safetensors to a canonical checkpoint",
    )
    option("--config", type=Path, help="run configuration to store; its model must match")
    option("--resolution", type=positive_int, metavar="PX", help="side of the images that the model generates")
    option("--text-encoder", help="folder or hub id of the text encoder")
    _writing(option, files=1)
    text = "write the release's layout, safetensors, or a diffusers-style folder"
    option = command("export", _export, "source target", text)
    option("--format", choices=("release", "safetensors", "diffusers"), required=True)
    option("--weights", choices=("ema", "model", "both"), help="default: both for the release, else ema")
    option("--dtype", choices=_DTYPES, default="fp32")
    option(
        "--max-shard-bytes",
        type=positive_int,
        metavar="N",
        help="write several safetensors files of at most N bytes",
    )
    option("--dry-run", action="store_true", help="print what would be written")
    text = "convert between canonical folders, DeepSpeed's files, and its universal format"
    option = command("reshard", _reshard, "source target", text)
    option("--to", choices=("canonical", "deepspeed", "universal"), required=True)
    option("--dp", type=positive_int, metavar="N", help="data parallel ranks (--to deepspeed)")
    option("--tp", type=positive_int, metavar="M", help="tensor parallel ranks (--to deepspeed), default 1")
    option("--zero-stage", type=int, choices=(1, 2, 3), help="ZeRO stage (--to deepspeed)")
    option("--bf16", action="store_true", help="for a run with bf16.enabled (--to deepspeed)")
    option("--ema-from", choices=("model",), help="start the EMA at the weights, if the source has none")
    option("--config", type=Path, help="run configuration to store, if the source has none")
    memory = {"type": byte_count, "default": DEFAULT_MEMORY, "metavar": "BYTES"}
    option("--memory", **memory, help="limit of the tensors in memory; default 4GiB")
    _writing(option, files=None)
    option = command("average", _average, "target source+", "average canonical checkpoints")
    option("--weights", type=_numbers, metavar="W1,W2,...", help="default: equal")
    option(
        "--ema-width",
        type=float,
        metavar="SIGMA",
        help="compute the EMA of this width, relative to the run's length",
    )
    text = "largest accepted relative error of the width; default 0.1"
    option("--max-error", type=_not_negative, default=0.1, help=text)
    _writing(option, files=1)
    return parser


def _writing(option: Callable[..., argparse.Action], *, files: int | None) -> None:
    """Options of the commands that write a canonical folder; ``files`` None leaves the number to the plan."""
    default = f" (--to canonical), default {DEFAULT_FILES}" if files is None else ""
    option("--files", type=positive_int, default=files, metavar="N", help=f"number of tensor files{default}")
    workers = default_workers(MAX_WORKERS)
    option(
        "--workers",
        type=positive_int,
        default=workers,
        metavar="N",
        help="threads, each of which writes a file of a canonical folder, or converts a tensor",
    )
    option("--dry-run", action="store_true", help="print what would be written")


def _each(
    console: Console, title: str, names: Collection[str], compute: Callable[[str], Result]
) -> dict[str, Result]:
    """What ``compute`` makes of each name, under a progress bar."""
    results = {}
    with progress_bar(console, title, len(names)) as advance:
        for name in names:
            results[name] = compute(name)
            advance(name)
    return results


def _inspect(args: argparse.Namespace, console: Console) -> int:
    source = open_checkpoint(args.path)
    console.print(facts_table(source))
    facts = _each(console, "reading", source.specs, lambda name: tensor_facts(source, name))
    if args.tensors:
        console.print(tensors_table(source, facts))
    broken = {n: f for n, f in facts.items() if f.nans}
    print_list(console, "tensors with infinities", [n for n, f in facts.items() if f.infinities])
    fresh = source.meta is not None and source.meta.step == 0
    note = "" if fresh else " (normal for zero-initialised ones at step 0)"
    print_list(console, f"tensors are all zero{note}", [n for n, f in facts.items() if f.zero])
    print_list(console, "tensors with NaN", [f"{n}: {f.nans:,} NaN" for n, f in broken.items()])
    return 1 if broken else 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    if not args.path.exists():
        raise ConfigError(f"{args.path}: no such file or folder")
    with progress_bar(console, "verifying", None) as advance:
        problems = list(problems_of(args.path, advance=advance))
    if problems:
        for problem in problems:
            print_error("deco-ckpt", problem, 1)
        return 1
    matches, readable = (
        "every file matches its checksum",
        "readable throughout; it comes without checksums of its files",
    )
    print_line(console, f"{args.path}: {matches if has_checksums(args.path) else readable}")
    return 0


def _diff(args: argparse.Namespace, console: Console) -> int:
    first, second = open_checkpoint(args.first), open_checkpoint(args.second)

    def selected(source: CheckpointReader) -> dict[str, TensorSpec]:
        prefix = f"{args.only}." if args.only else ""
        return {n: s for n, s in source.specs.items() if n.startswith(prefix)}

    ours, theirs = selected(first), selected(second)
    if not ours and not theirs:
        raise ConfigError(f"neither checkpoint has {args.only}.* tensors")
    common = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    print_list(console, f"only in {args.first}", sorted(set(ours) - set(theirs)))
    print_list(console, f"only in {args.second}", sorted(set(theirs) - set(ours)))
    shapes = [f"{n}: {ours[n].shape} and {theirs[n].shape}" for n in ours if n in theirs and n not in common]
    print_list(console, "of different shapes", shapes)
    differences = _each(console, "comparing", common, lambda name: difference(first, second, name))
    different = {n: d for n, d in differences.items() if d.absolute > args.tolerance}
    if any(d.absolute for d in differences.values()):
        console.print(differences_table({n: d for n, d in differences.items() if d.absolute}))
    beyond = f"beyond {args.tolerance:g}" if args.tolerance else "in value"
    print_line(console, f"{len(common):,} tensors compared, {len(different):,} differ {beyond}")
    return 1 if different or shapes or set(ours) != set(theirs) else 0


def _import(args: argparse.Namespace, console: Console) -> int:
    config = None
    if args.config is not None:
        if args.resolution or args.text_encoder:
            raise ConfigError("--resolution and --text-encoder are set in the --config file where one is given")
        config = load_config(args.config)
    stated = {n: getattr(config.model, n) for n in config.model.__slots__} if config is not None else None
    source = _verified(args.source, console, stated=stated)
    if config is not None and source.model != config.model:
        raise ConfigError(f"{args.config}: its model is {config.model}, that of {args.source} is {source.model}")
    plan = plan_import(
        source, config=config, resolution=args.resolution, text_encoder=args.text_encoder, files=args.files,
        workers=args.workers,
    )  # fmt: skip
    return _write(args, console, "importing", plan)


def _export(args: argparse.Namespace, console: Console) -> int:
    plan = plan_export(
        _verified(args.source, console),
        format=args.format,
        weights=args.weights or ("both" if args.format == "release" else "ema"),
        dtype=_DTYPES[args.dtype],
        max_shard_bytes=args.max_shard_bytes,
    )
    return _write(args, console, "exporting", plan)


def _reshard(args: argparse.Namespace, console: Console) -> int:
    layout = None
    if (args.dp, args.tp, args.zero_stage, args.bf16) != (None, None, None, False):
        if args.dp is None or args.zero_stage is None:
            raise ConfigError("--to deepspeed needs --dp and --zero-stage")
        layout = ZeroLayout(args.dp, args.tp or 1, args.zero_stage, args.bf16)
    plan = plan_reshard(
        _verified(args.source, console), to=args.to, layout=layout, files=args.files, workers=args.workers,
        memory=args.memory, ema_from_model=args.ema_from is not None,
        config=load_config(args.config) if args.config else None,
    )  # fmt: skip
    return _write(args, console, "resharding", plan)


def _average(args: argparse.Namespace, console: Console) -> int:
    plan = plan_average(
        [_verified(path, console) for path in args.source], weights=args.weights, ema_width=args.ema_width,
        max_error=args.max_error, files=args.files, workers=args.workers,
    )  # fmt: skip
    return _write(args, console, "averaging", plan)


def _write(args: argparse.Namespace, console: Console, title: str, plan: Plan) -> int:
    """Show a plan and, unless it is a dry run, write it under a progress bar."""
    refuse_existing(args.target)
    for line in plan.lines:
        print_line(console, line)
    if args.dry_run:
        print_line(console, f"a dry run: {args.target} is not written")
        return 0
    with progress_bar(console, title, plan.count) as advance:
        meta = plan.write(args.target, advance)
    digest = f", parameter digest {meta.parameter_digest}" if meta is not None else ""
    print_line(console, f"wrote {args.target}{digest}")
    return 0


def _verified(path: Path, console: Console, *, stated: Mapping[str, Any] | None = None) -> CheckpointReader:
    """Open a source, which must be intact: compares the checksums of a canonical folder."""
    source = open_checkpoint(path, stated=stated)
    if source.meta is not None:
        with console.status(f"comparing checksums of {cell(source.path)}"):
            verify(source.path)
    return source


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative or not finite")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
