"""The ``deco-data`` command: pack, index, inspect, verify, bench, serve.

Exit codes: 0 done, 1 the check or run failed, 2 wrong use.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from data_pipeline.errors import DataError
from data_pipeline.index.build import TEXT_SUFFIXES, ScanSettings, build_index, save_index
from data_pipeline.index.format import load_index
from data_pipeline.pack.class_folders import class_names, read_class_folders
from data_pipeline.pack.readers import read_source
from data_pipeline.pack.verify import verify
from data_pipeline.pack.writer import OccupiedError, pack
from data_pipeline.storage.base import Access, open_store
from data_pipeline.storage.dev_server import running_server
from data_pipeline.tools.bench import Measurement, measure
from data_pipeline.tools.inspect import draw_contact_sheet, draw_histograms, facts, human_bytes, summarise

LISTED = 20
"""Problems listed by name; the rest are counted."""
MAX_WORKERS = 16
"""Default for machines with many cores, which other jobs may share."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"deco-data: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console()
    try:
        return int(args.run(args, console))
    except OccupiedError as error:
        return _complain(error, 2)
    except DataError as error:
        return _complain(error, 1)
    except OSError as error:
        return _complain(f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--anonymous", action="store_true", help="unsigned requests, for public buckets")
    common.add_argument("--requester-pays", action="store_true", help="accept the costs of such a bucket")
    parser = _Parser(prog="deco-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, run: Callable[..., int], help: str, *, workers: bool = True) -> argparse.ArgumentParser:
        parents = [] if run is _serve else [common]
        made = commands.add_parser(name, help=help, description=help, parents=parents)
        made.set_defaults(run=run)
        if workers:
            made.add_argument("--workers", type=_positive_int, default=_cores(), metavar="N")
        return made

    packing = command("pack", _pack, "pack pictures with captions into tar shards, and index them")
    packing.add_argument("source", help="folder of pictures, parquet or tar files, or s3:// URL of tar shards")
    packing.add_argument("url", help="where the shards go: s3://bucket/prefix or a folder")
    packing.add_argument("--shard-mb", type=_positive, default=256.0, metavar="MB")
    packing.add_argument(
        "--class-folders", action="store_true", help="SOURCE/NAME/*.jpg: the class is NAME's place among the names"
    )
    packing.add_argument("--overwrite", action="store_true", help="replace shards that were packed there before")
    _scan_options(packing)
    indexing = command("index", _index, "index the tar shards below a URL")
    indexing.add_argument("url")
    _scan_options(indexing)
    indexing.add_argument("--fresh", action="store_true", help="read shards again that have not changed")
    showing = command("inspect", _inspect, "show what an index holds", workers=False)
    showing.add_argument("url")
    showing.add_argument("--figures", type=Path, metavar="DIR", help="draw histograms.png and contact_sheet.png")
    showing.add_argument("--samples", type=_positive_int, default=24, metavar="N", help="on the contact sheet")
    showing.add_argument("--resolution", type=_positive_int, nargs="+", default=[256, 512], metavar="PX")
    checking = command("verify", _verify, "read all shards and compare them with the index and shards.json")
    checking.add_argument("url")
    checking.add_argument("--decode", action="store_true", help="decode every picture and parse every caption too")
    checking.add_argument("--problems", type=Path, metavar="FILE", help="write all problems there")
    timing = command("bench", _bench, "measure how fast samples are read and decoded here", workers=False)
    timing.add_argument("url")
    timing.add_argument("--seconds", type=_positive, default=10.0)
    timing.add_argument("--resolution", type=_positive_int, default=256, metavar="PX")
    timing.add_argument("--workers", type=_positive_int, nargs="+", default=[_cores()], metavar="N")
    serving = command("serve", _serve, "run the embedded S3 server until interrupted", workers=False)
    serving.add_argument("folder", type=Path)
    serving.add_argument("--bucket", default="demo")
    return parser


def _scan_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--score", nargs="+", action="extend", default=[], metavar="NAME", help="numbers of the .json to index"
    )
    parser.add_argument(
        "--caption-field", nargs="+", action="extend", metavar="NAME", help="fields of the .json with captions"
    )
    parser.add_argument("--text", type=_suffixes, metavar="txt,json,cls", help="which text member is preferred")
    parser.add_argument("--problems", type=Path, metavar="FILE", help="write all problems there")


def _pack(args: argparse.Namespace, console: Console) -> int:
    skipped: list[str] = []
    access, started = _access(args), time.perf_counter()
    classes: list[str] = []
    if args.class_folders:
        classes = class_names(Path(args.source).expanduser(), skipped)
        samples = read_class_folders(Path(args.source).expanduser(), classes, skipped, workers=args.workers)
    else:
        samples = read_source(args.source, skipped, access=access, workers=args.workers)
    columns = (TextColumn("packing"), BarColumn(), TextColumn("{task.completed:,} samples"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)
        report = pack(
            samples,
            open_store(args.url, access),
            shard_bytes=int(args.shard_mb * 1e6),
            skipped=skipped,
            classes=classes,
            overwrite=args.overwrite,
            progress=lambda count: progress.update(task, completed=count),
        )
    rate = report.samples / (time.perf_counter() - started)
    _say(
        console,
        f"packed {report.samples:,} samples into {len(report.shards):,} shards at {args.url}, {rate:,.0f}/s",
    )
    _list(console, "left out", report.skipped)
    if not report.captioned and args.text is None:
        # Else a .json that holds only numbers would be taken for the text.
        args.text = ("cls", "txt", "json")
    return _scan(args, console, left_out=report.skipped, fresh=True)


def _index(args: argparse.Namespace, console: Console) -> int:
    return _scan(args, console, left_out=[], fresh=args.fresh)


def _scan(args: argparse.Namespace, console: Console, *, left_out: list[str], fresh: bool) -> int:
    given = {"caption_fields": args.caption_field, "text": args.text}
    settings = ScanSettings(
        scores=tuple(dict.fromkeys(args.score)), **{n: tuple(v) for n, v in given.items() if v}
    )
    access, started = _access(args), time.perf_counter()
    store = open_store(args.url, access)
    with _bar(console, "indexing") as progress:
        index, report = build_index(
            store, settings, access=access, workers=args.workers, fresh=fresh, progress=progress
        )
    save_index(store, index)
    rate = len(index) / (time.perf_counter() - started)
    _say(
        console,
        f"indexed {len(index):,} samples in {len(index.shards):,} shards ({report.reused:,} unchanged), "
        f"digest {index.digest}, {rate:,.0f} samples/s",
    )
    _list(console, "not usable", report.problems)
    _write_problems(args.problems, left_out + report.problems)
    if not len(index):
        return _complain(f"{args.url}: none of the samples is usable", 1)
    return 0


def _inspect(args: argparse.Namespace, console: Console) -> int:
    store = open_store(args.url, _access(args))
    index = load_index(store)
    summary = summarise(index)
    table = Table("quantity", "value", title=args.url)
    for name, value in facts(index, summary, args.resolution):
        table.add_row(_printable(name), value)
    console.print(table)
    if args.figures is None:
        return 0
    try:
        args.figures.mkdir(parents=True, exist_ok=True)
        histograms, sheet = args.figures / "histograms.png", args.figures / "contact_sheet.png"
        draw_histograms(index, summary, histograms)
        problems = draw_contact_sheet(store, index, sheet, samples=args.samples, resolution=args.resolution[0])
    except OSError as error:
        raise DataError(f"{args.figures}: {error.strerror or error}") from error
    _say(console, f"drew {histograms} and {sheet}")
    _list(console, "samples could not be shown", problems)
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    access, started = _access(args), time.perf_counter()
    with _bar(console, "verifying") as progress:
        report = verify(
            open_store(args.url, access),
            access=access,
            workers=args.workers,
            decode_pictures=args.decode,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    decoded = f", {report.decoded:,} decoded" if args.decode else ""
    _say(
        console,
        f"read {report.samples:,} samples{decoded} in {report.shards:,} shards "
        f"({report.checksums:,} with a SHA-256), "
        f"{human_bytes(report.bytes)} at {report.bytes / seconds / 1e6:,.0f} MB/s",
    )
    _list(console, "problems", report.problems)
    _write_problems(args.problems, report.problems)
    if report.problems:
        return _complain(f"{args.url}: {len(report.problems):,} problems", 1)
    _say(console, "all is as the index says")
    return 0


def _bench(args: argparse.Namespace, console: Console) -> int:
    found: list[Measurement] = []
    for workers in dict.fromkeys(args.workers):
        for mode in ("exact", "fast"):
            with console.status(f"decoding {mode} with {workers} workers, {args.seconds:g} s"):
                found.append(
                    measure(
                        args.url,
                        mode=mode,  # type: ignore[arg-type]
                        workers=workers,
                        resolution=args.resolution,
                        seconds=args.seconds,
                        access=_access(args),
                        say=lambda message: _say(console, message),
                    )
                )
    table = Table("quantity", title=f"{args.url} at {args.resolution} px")
    for one in found:
        table.add_column(f"{one.mode}, {one.workers} workers", justify="right")
    table.add_row("images/s", *(f"{one.images_per_s:,.1f}" for one in found))
    table.add_row("MB/s read", *(f"{one.mb_per_s:,.1f}" for one in found))
    for name in dict.fromkeys(name for one in found for name in one.counters):
        table.add_row(name, *(f"{one.counters[name]:,}" for one in found))
    console.print(table)
    return 0


def _serve(args: argparse.Namespace, console: Console) -> int:
    with running_server(args.folder) as server:
        server.create_bucket(args.bucket)
        console.print(f"S3 at {server.endpoint}, bucket {args.bucket}, data in {server.folder}")
        console.print(f"credentials: {server.folder / 'credentials'} (access key, secret key)")
        return server.wait()


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[str, int, int], None]]:
    """Progress by shard, gone when it is done."""
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[key]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, key="")
        yield lambda key, done, total: progress.update(task, completed=done, total=total, key=_printable(key))


def _list(console: Console, what: str, problems: list[str]) -> None:
    if problems:
        _say(console, f"{len(problems):,} {what}:")
        for problem in problems[:LISTED]:
            _say(console, f"  {problem}")
        if len(problems) > LISTED:
            _say(console, f"  and {len(problems) - LISTED:,} more")


def _write_problems(path: Path | None, problems: list[str]) -> None:
    if path is not None:
        try:
            path.write_text("".join(f"{_printable(problem)}\n" for problem in problems), encoding="utf-8")
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}") from error


def _say(console: Console, text: str) -> None:
    console.print(_printable(text), markup=False, highlight=False, soft_wrap=True)


def _complain(error: Any, code: int) -> int:
    print(f"deco-data: {_printable(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def _printable(text: str) -> str:
    """Names in data are anyone's: none of them may steer the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _access(args: argparse.Namespace) -> Access:
    return Access(anonymous=args.anonymous, requester_pays=args.requester_pays)


def _cores() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)))


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _suffixes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(TEXT_SUFFIXES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(TEXT_SUFFIXES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
