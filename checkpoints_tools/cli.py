"""The ``deco-ckpt`` command: inspect, verify, diff, import, export, reshard, average.

Exit codes: 0 done, 1 the check found something or the disk refused, 2 wrong use or an unreadable checkpoint.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from checkpoints_tools.averaging import average, check_alike, fit_width, shares_of
from checkpoints_tools.exporting import Weights, export_checkpoint, plan_export
from checkpoints_tools.formats import open_checkpoint
from checkpoints_tools.importing import import_checkpoint, plan_import
from checkpoints_tools.measures import difference, tensor_facts
from checkpoints_tools.reshard import add_arguments, plan_reshard
from checkpoints_tools.show import differences_table, facts_table, printable, size_text, tensors_table
from checkpoints_tools.source import SETS, Advance, Source, TensorSpec
from checkpoints_tools.verify import has_checksums, problems_of
from checkpoints_tools.work import use_large_pages
from checkpoints_tools.zero_writer import ZeroLayout
from deco_scale.config import load_config
from deco_scale.errors import ConfigError, RunError
from deco_scale.training.checkpoint_format import verify

LISTED = 20
"""Names that are listed before the rest are counted."""
MAX_WORKERS = 8


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"deco-ckpt: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    use_large_pages()
    try:
        return int(args.run(args, Console()))
    except ConfigError as error:
        return _complain(error, 2)
    except RunError as error:
        return _complain(error, 1)
    except OSError as error:
        return _complain(f"{error.filename or ''}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="deco-ckpt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., int], help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help)
        made.set_defaults(run=run)
        return made

    showing = command("inspect", _inspect, "show what a checkpoint holds; 1 if there are NaN in it")
    showing.add_argument("path", type=Path)
    showing.add_argument("--tensors", action="store_true", help="a line with statistics for each tensor")
    checking = command("verify", _verify, "compare checksums, index and the weights' digest")
    checking.add_argument("path", type=Path)
    comparing = command("diff", _diff, "compare two checkpoints of any formats; 1 if they differ")
    comparing.add_argument("first", type=Path)
    comparing.add_argument("second", type=Path)
    comparing.add_argument("--only", choices=SETS, help="compare one set of tensors")
    comparing.add_argument("--tolerance", type=_not_negative, default=0.0, help="allowed absolute difference")
    importing = command("import", _import, "make a canonical checkpoint of the release's weights or safetensors")
    importing.add_argument("source", type=Path)
    importing.add_argument("target", type=Path)
    importing.add_argument("--config", type=Path, help="run configuration to store; its model must fit")
    importing.add_argument("--resolution", type=_positive_int, metavar="PX", help="side that the model draws")
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
    exporting.add_argument("--max-shard-bytes", type=_positive_int, metavar="N", help="several safetensors files")
    exporting.add_argument("--dry-run", action="store_true", help="say what would be written")
    resharding = command(
        "reshard", _reshard, "move between canonical, DeepSpeed's files, and its universal format"
    )
    add_arguments(resharding, workers=_cores())
    averaging = command("average", _average, "average canonical checkpoints")
    averaging.add_argument("target", type=Path)
    averaging.add_argument("source", type=Path, nargs="+")
    averaging.add_argument("--weights", type=_numbers, metavar="W1,W2,...", help="default: equal")
    averaging.add_argument(
        "--ema-width", type=float, metavar="SIGMA", help="EMA of this width, relative to the run"
    )
    averaging.add_argument("--max-error", type=_not_negative, default=0.1, help="of the width, default 0.1")
    _writing(averaging)
    return parser


def _writing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--files", type=_positive_int, default=1, metavar="N", help="number of tensor files")
    parser.add_argument(
        "--workers", type=_positive_int, default=_cores(), metavar="N", help="threads, one file each"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be written")


def _inspect(args: argparse.Namespace, console: Console) -> int:
    source = open_checkpoint(args.path)
    console.print(facts_table(source))
    facts = {}
    with _bar(console, "reading", len(source.specs)) as advance:
        for name in source.specs:
            facts[name] = tensor_facts(source, name)
            advance(name)
    if args.tensors:
        console.print(tensors_table(source, facts))
    broken = {n: f for n, f in facts.items() if f.nans}
    _list(console, "tensors with infinities", [n for n, f in facts.items() if f.infinities])
    fresh = source.meta is not None and source.meta.step == 0
    note = "" if fresh else " (normal for zero-initialised ones at step 0)"
    _list(console, f"tensors are all zero{note}", [n for n, f in facts.items() if f.zero])
    _list(console, "tensors with NaN", [f"{n}: {f.nans:,} NaN" for n, f in broken.items()])
    return 1 if broken else 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    if not args.path.exists():
        raise ConfigError(f"{args.path}: no such file or folder")
    with _bar(console, "verifying", None) as advance:
        problems = list(problems_of(args.path, advance=advance))
    if problems:
        for problem in problems:
            print(f"deco-ckpt: {printable(problem)}", file=sys.stderr)
        return 1
    if has_checksums(args.path):
        _say(console, f"{args.path}: every file is as its checksum says")
    else:
        _say(console, f"{args.path}: readable throughout; it comes without checksums of its files")
    return 0


def _diff(args: argparse.Namespace, console: Console) -> int:
    first, second = open_checkpoint(args.first), open_checkpoint(args.second)

    def chosen(source: Source) -> dict[str, TensorSpec]:
        prefix = f"{args.only}." if args.only else ""
        return {n: s for n, s in source.specs.items() if n.startswith(prefix)}

    ours, theirs = chosen(first), chosen(second)
    if not ours and not theirs:
        raise ConfigError(f"neither checkpoint has {args.only}.* tensors")
    common = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    _list(console, f"only in {args.first}", sorted(set(ours) - set(theirs)))
    _list(console, f"only in {args.second}", sorted(set(theirs) - set(ours)))
    shapes = [f"{n}: {ours[n].shape} and {theirs[n].shape}" for n in ours if n in theirs and n not in common]
    _list(console, "of different shapes", shapes)
    found = {}
    with _bar(console, "comparing", len(common)) as advance:
        for name in common:
            found[name] = difference(first, second, name)
            advance(name)
    apart = {n: d for n, d in found.items() if d.absolute > args.tolerance}
    if any(d.absolute for d in found.values()):
        console.print(differences_table({n: d for n, d in found.items() if d.absolute}))
    beyond = f"beyond {args.tolerance:g}" if args.tolerance else "in value"
    _say(console, f"{len(common):,} tensors compared, {len(apart):,} differ {beyond}")
    return 1 if apart or shapes or set(ours) != set(theirs) else 0


def _import(args: argparse.Namespace, console: Console) -> int:
    config = None
    if args.config is not None:
        if args.resolution or args.text_encoder:
            raise ConfigError("--resolution and --text-encoder are set in the --config file where one is given")
        config = load_config(args.config)
    stated = {n: getattr(config.model, n) for n in config.model.__slots__} if config is not None else None
    source = _checked(open_checkpoint(args.source, stated=stated), console)
    if config is not None and source.model != config.model:
        raise ConfigError(f"{args.config}: its model is {config.model}, that of {args.source} is {source.model}")
    plan = plan_import(source, config=config, resolution=args.resolution, text_encoder=args.text_encoder)
    _refuse_existing(args.target)
    for remark in plan.remarks:
        _say(console, f"note: {remark}")
    size = sum(spec.nbytes for spec in plan.specs.values())
    _say(console, f"{source.model.kind}: {len(plan.specs):,} tensors, {size_text(size)} in fp32, to {args.target}")
    if args.dry_run:
        return 0
    with _bar(console, "importing", len(plan.specs)) as advance:
        meta = import_checkpoint(
            source, plan, args.target, files=args.files, workers=args.workers, advance=advance
        )
    _say(console, f"wrote {args.target}, parameter digest {meta.parameter_digest}")
    return 0


def _export(args: argparse.Namespace, console: Console) -> int:
    source = _checked(open_checkpoint(args.source), console)
    weights: Weights = args.weights or ("both" if args.format == "release" else "ema")
    if args.format == "release" and args.max_shard_bytes is not None:
        raise ConfigError("--max-shard-bytes is for safetensors: the release's .ckpt is one file")
    dtype = torch.float32 if args.dtype == "fp32" else torch.bfloat16
    plan = plan_export(source, format=args.format, weights=weights, dtype=dtype)
    _refuse_existing(args.target)
    _say(console, f"{len(plan.specs):,} tensors, {size_text(plan.nbytes)} in {args.dtype}, to {args.target}")
    if args.dry_run:
        return 0
    with _bar(console, "exporting", len(plan.specs)) as advance:
        export_checkpoint(plan, args.target, max_shard_bytes=args.max_shard_bytes, advance=advance)
    _say(console, f"wrote {args.target}")
    return 0


def _reshard(args: argparse.Namespace, console: Console) -> int:
    layout = None
    if (args.dp, args.tp, args.zero_stage, args.bf16) != (None, None, None, False):
        if args.dp is None or args.zero_stage is None:
            raise ConfigError("--to deepspeed needs --dp and --zero-stage")
        layout = ZeroLayout(args.dp, 1 if args.tp is None else args.tp, args.zero_stage, args.bf16)
    source = _checked(open_checkpoint(args.source), console)
    _refuse_existing(args.target)
    plan = plan_reshard(
        source, to=args.to, layout=layout, files=args.files, workers=args.workers, memory=args.memory,
        ema_from_model=args.ema_from is not None, config=load_config(args.config) if args.config else None,
    )  # fmt: skip
    for line in plan.lines:
        _say(console, line)
    if args.dry_run:
        return 0
    with _bar(console, "resharding", plan.count) as advance:
        plan.write(args.target, advance)
    _say(console, f"wrote {args.target}")
    return 0


def _average(args: argparse.Namespace, console: Console) -> int:
    sources = [_checked(open_checkpoint(path), console) for path in args.source]
    metas = [s.meta for s in sources if s.meta is not None]
    if len(metas) < len(sources):
        raise ConfigError("average takes canonical checkpoints; import others first")
    check_alike(sources)
    _refuse_existing(args.target)
    if args.ema_width is not None:
        if args.weights is not None:
            raise ConfigError("--weights and --ema-width are two ways to weigh: give one")
        decays = {m.config.get("optimizer", {}).get("ema_decay") for m in metas}
        decay = next(iter(decays))
        if len(decays) > 1 or not isinstance(decay, float):
            raise ConfigError(f"--ema-width needs one known optimizer.ema_decay, the checkpoints have {decays}")
        sources.sort(key=lambda s: s.meta.optimizer_steps if s.meta is not None else 0)
        fit = fit_width(args.ema_width, sorted(m.optimizer_steps for m in metas), decay)
        _say(
            console,
            f"fitted: width {fit.width:.4f} (wanted {args.ema_width:g}), mean at {fit.mean:.4f} of the run "
            f"(wanted {fit.wanted_mean:.4f}), relative error {fit.error:.4f}",
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
        _say(console, f"{share:+.6f}  {source.path}")
    if args.dry_run:
        return 0
    count = sum(n.startswith(("model.", "ema.")) for n in sources[-1].specs)
    with _bar(console, "averaging", count) as advance:
        meta = average(
            sources, shares, args.target, only_ema=args.ema_width is not None, files=args.files,
            workers=args.workers, advance=advance,
        )  # fmt: skip
    _say(console, f"wrote {args.target}, parameter digest {meta.parameter_digest}")
    return 0


def _checked(source: Source, console: Console) -> Source:
    """What is copied from must be intact: compares a canonical folder's checksums."""
    if source.meta is not None:
        with console.status(f"comparing checksums of {printable(str(source.path))}"):
            verify(source.path)
    return source


@contextmanager
def _bar(console: Console, what: str, total: int | None) -> Iterator[Advance]:
    """Progress by tensor, gone when it is done."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, name="")
        yield lambda name: progress.update(task, advance=1, name=printable(name))


def _list(console: Console, what: str, names: Sequence[str]) -> None:
    if names:
        _say(console, f"{len(names):,} {what}:")
        for name in names[:LISTED]:
            _say(console, f"  {name}")
        if len(names) > LISTED:
            _say(console, f"  and {len(names) - LISTED:,} more")


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"{target} exists already; name a new one")


def _say(console: Console, text: str) -> None:
    safe = "".join(c if c.isprintable() else "?" for c in text)
    console.print(safe, markup=False, highlight=False, soft_wrap=True)


def _complain(error: object, code: int) -> int:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))
    print(f"deco-ckpt: {text}", file=sys.stderr)
    return code


def _cores() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _not_negative(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is negative or not finite")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


if __name__ == "__main__":
    sys.exit(main())
