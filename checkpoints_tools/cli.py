"""The ``deco-ckpt`` command: inspect, verify, diff, import, export, reshard, average.

Exit codes: 0 done, 1 a check failed or the disk cannot be written, 2 wrong usage or an unreadable checkpoint.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from checkpoints_tools.average import average, check_alike, fit_width, shares_of
from checkpoints_tools.base import SETS, CheckpointReader, TensorSpec, refuse_existing
from checkpoints_tools.convert import Weights, export_checkpoint, import_checkpoint, plan_export, plan_import
from checkpoints_tools.formats.zero.writer import ZeroLayout
from checkpoints_tools.memory_budget import use_large_pages
from checkpoints_tools.registry import open_checkpoint
from checkpoints_tools.reshard import add_arguments, plan_reshard
from checkpoints_tools.tables import differences_table, facts_table, tensors_table
from checkpoints_tools.tensor_stats import difference, tensor_facts
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
from data_pipeline.text import human_bytes
from deco_scale.checkpoint.format import verify
from deco_scale.config import load_config
from deco_scale.errors import ConfigError, RunError

MAX_WORKERS = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    use_large_pages()
    try:
        return int(args.run(args, Console()))
    except ConfigError as error:
        return print_error("deco-ckpt", error, 2)
    except RunError as error:
        return print_error("deco-ckpt", error, 1)
    except OSError as error:
        return print_error("deco-ckpt", f"{error.filename or ''}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="deco-ckpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    showing = command("inspect", _inspect, "show a checkpoint's contents; exit code 1 if it contains NaN")
    showing.add_argument("path", type=Path)
    showing.add_argument("--tensors", action="store_true", help="a line with statistics for each tensor")
    checking = command("verify", _verify, "compare checksums, index and the weights' digest")
    checking.add_argument("path", type=Path)
    comparing = command("diff", _diff, "compare two checkpoints of any formats; exit code 1 if they differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--only", choices=SETS, help="compare one set of tensors")
    comparing.add_argument("--tolerance", type=_not_negative, default=0.0, help="allowed absolute difference")
    importing = command(
        "import", _import, "convert the release's weights or safetensors to a canonical checkpoint"
    )
    importing.add_argument("source", type=Path)
    importing.add_argument("target", type=Path)
    importing.add_argument("--config", type=Path, help="run configuration to store; its model must match")
    importing.add_argument(
        "--resolution", type=positive_int, metavar="PX", help="side of the images that the model generates"
    )
    importing.add_argument("--text-encoder", help="folder or hub id of the text encoder")
    _writing(importing)
    exporting = command("export", _export, "write the release's layout, safetensors, or a diffusers-style folder")
    exporting.add_argument("source", type=Path)
    exporting.add_argument("target", type=Path)
    exporting.add_argument("--format", choices=("release", "safetensors", "diffusers"), required=True)
    exporting.add_argument(
        "--weights", choices=("ema", "model", "both"), help="default: both for the release, else ema"
    )
    exporting.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    exporting.add_argument(
        "--max-shard-bytes",
        type=positive_int,
        metavar="N",
        help="write several safetensors files of at most N bytes",
    )
    exporting.add_argument("--dry-run", action="store_true", help="print what would be written")
    resharding = command(
        "reshard", _reshard, "convert between canonical folders, DeepSpeed's files, and its universal format"
    )
    add_arguments(resharding, workers=default_workers(MAX_WORKERS))
    averaging = command("average", _average, "average canonical checkpoints")
    averaging.add_argument("target", type=Path)
    averaging.add_argument("source", type=Path, nargs="+")
    averaging.add_argument("--weights", type=_numbers, metavar="W1,W2,...", help="default: equal")
    averaging.add_argument(
        "--ema-width",
        type=float,
        metavar="SIGMA",
        help="compute the EMA of this width, relative to the run's length",
    )
    averaging.add_argument(
        "--max-error",
        type=_not_negative,
        default=0.1,
        help="largest accepted relative error of the width; default 0.1",
    )
    _writing(averaging)
    return parser


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=positive_int, default=1, metavar="N", help="number of tensor files")
    workers = default_workers(MAX_WORKERS)
    parser.add_argument(
        "--workers", type=positive_int, default=workers, metavar="N", help="threads, each of which writes one file"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be written")


def _inspect(args: argparse.Namespace, console: Console) -> int:
    source = open_checkpoint(args.path)
    console.print(facts_table(source))
    facts = {}
    with progress_bar(console, "reading", len(source.specs)) as advance:
        for name in source.specs:
            facts[name] = tensor_facts(source, name)
            advance(name)
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
    if has_checksums(args.path):
        print_line(console, f"{args.path}: every file matches its checksum")
    else:
        print_line(console, f"{args.path}: readable throughout; it comes without checksums of its files")
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
    differences = {}
    with progress_bar(console, "comparing", len(common)) as advance:
        for name in common:
            differences[name] = difference(first, second, name)
            advance(name)
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
    source = _verified(open_checkpoint(args.source, stated=stated), console)
    if config is not None and source.model != config.model:
        raise ConfigError(f"{args.config}: its model is {config.model}, that of {args.source} is {source.model}")
    plan = plan_import(source, config=config, resolution=args.resolution, text_encoder=args.text_encoder)
    refuse_existing(args.target)
    for remark in plan.remarks:
        print_line(console, f"note: {remark}")
    size = sum(spec.nbytes for spec in plan.specs.values())
    print_line(
        console, f"{source.model.kind}: {len(plan.specs):,} tensors, {human_bytes(size)} in fp32, to {args.target}"
    )
    write = partial(import_checkpoint, source, plan, args.target, files=args.files, workers=args.workers)
    return _write(args, console, "importing", len(plan.specs), write)


def _export(args: argparse.Namespace, console: Console) -> int:
    source = _verified(open_checkpoint(args.source), console)
    weights: Weights = args.weights or ("both" if args.format == "release" else "ema")
    if args.format == "release" and args.max_shard_bytes is not None:
        raise ConfigError("--max-shard-bytes is for safetensors: the release's .ckpt is one file")
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    plan = plan_export(source, format=args.format, weights=weights, dtype=dtype)
    refuse_existing(args.target)
    print_line(
        console, f"{len(plan.specs):,} tensors, {human_bytes(plan.nbytes)} in {args.dtype}, to {args.target}"
    )
    write = partial(export_checkpoint, plan, args.target, max_shard_bytes=args.max_shard_bytes)
    return _write(args, console, "exporting", len(plan.specs), write)


def _reshard(args: argparse.Namespace, console: Console) -> int:
    layout = None
    if (args.dp, args.tp, args.zero_stage, args.bf16) != (None, None, None, False):
        if args.dp is None or args.zero_stage is None:
            raise ConfigError("--to deepspeed needs --dp and --zero-stage")
        layout = ZeroLayout(args.dp, 1 if args.tp is None else args.tp, args.zero_stage, args.bf16)
    source = _verified(open_checkpoint(args.source), console)
    refuse_existing(args.target)
    plan = plan_reshard(
        source, to=args.to, layout=layout, files=args.files, workers=args.workers, memory=args.memory,
        ema_from_model=args.ema_from is not None, config=load_config(args.config) if args.config else None,
    )  # fmt: skip
    for line in plan.lines:
        print_line(console, line)
    return _write(args, console, "resharding", plan.count, partial(plan.write, args.target))


def _average(args: argparse.Namespace, console: Console) -> int:
    sources = [_verified(open_checkpoint(path), console) for path in args.source]
    metas = [s.meta for s in sources if s.meta is not None]
    if len(metas) < len(sources):
        raise ConfigError("average takes canonical checkpoints; import others first")
    check_alike(sources)
    refuse_existing(args.target)
    if args.ema_width is not None:
        if args.weights is not None:
            raise ConfigError("--weights and --ema-width exclude each other: give one")
        decays = {m.config.get("optimizer", {}).get("ema_decay") for m in metas}
        decay = next(iter(decays))
        if len(decays) > 1 or not isinstance(decay, float):
            raise ConfigError(f"--ema-width needs one known optimizer.ema_decay, the checkpoints have {decays}")
        sources.sort(key=lambda s: s.meta.optimizer_steps if s.meta is not None else 0)
        fit = fit_width(args.ema_width, sorted(m.optimizer_steps for m in metas), decay)
        print_line(
            console,
            f"fitted: width {fit.width:.4f} (requested {args.ema_width:g}), mean at {fit.mean:.4f} of the run "
            f"(expected {fit.expected_mean:.4f}), relative error {fit.error:.4f}",
        )
        if fit.error > args.max_error:
            raise ConfigError(
                f"--ema-width {args.ema_width}: these checkpoints allow it only with an error of {fit.error:.4f} "
                f"(allowed: {args.max_error}); give more of them, or another width"
            )
        shares: tuple[float, ...] = fit.coefficients
    else:
        shares = shares_of(args.weights, len(sources))
    for source, share in zip(sources, shares, strict=True):
        print_line(console, f"{share:+.6f}  {source.path}")
    count = sum(n.startswith(("model.", "ema.")) for n in sources[-1].specs)
    options = {"only_ema": args.ema_width is not None, "files": args.files, "workers": args.workers}
    write = partial(average, sources, shares, args.target, **options)
    return _write(args, console, "averaging", count, write)


def _write(args: argparse.Namespace, console: Console, title: str, count: int, write: Callable[..., Any]) -> int:
    """Run a planned write of ``count`` tensors under a progress bar, unless it is a dry run."""
    if args.dry_run:
        return 0
    with progress_bar(console, title, count) as advance:
        meta = write(advance=advance)
    digest = f", parameter digest {meta.parameter_digest}" if meta is not None else ""
    print_line(console, f"wrote {args.target}{digest}")
    return 0


def _verified(source: CheckpointReader, console: Console) -> CheckpointReader:
    """A source must be intact: compares the checksums of a canonical folder."""
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
