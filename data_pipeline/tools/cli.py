"""The ``deco-data`` command: pack, index, inspect, verify, bench, serve.

Exit codes: 0 done, 1 the check or run failed, 2 wrong usage.
"""

import argparse
import functools
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from data_pipeline import console as shared
from data_pipeline.config import DataConfig
from data_pipeline.console import positive, positive_int, print_error, print_line, print_list, progress_bar
from data_pipeline.decode import DecodeMode
from data_pipeline.errors import DataError, Reject
from data_pipeline.index.build import TEXT_SUFFIXES, ScanSettings, build_index, save_index
from data_pipeline.index.format import load_index
from data_pipeline.pack.readers import class_names, read_class_folders, read_source
from data_pipeline.pack.verify import verify
from data_pipeline.pack.writer import OccupiedError, pack
from data_pipeline.storage.base import Access, Store, open_store
from data_pipeline.storage.dev_server import running_server
from data_pipeline.stream.loader import Loader
from data_pipeline.text import human_bytes, printable
from data_pipeline.tools.inspect import draw_contact_sheet, draw_histograms, facts, summarise

MAX_WORKERS = 16
"""Default for machines with many cores, which other jobs may share."""
BENCH_BATCH = 32
_GAUGES = ("queue_ready", "chunks_held", "bytes_held")
"""Counters of a present state, not sums."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    console = Console()
    try:
        return int(args.run(args, console))
    except DataError as error:
        return print_error("deco-data", error, 2 if isinstance(error, OccupiedError) else 1)
    except OSError as error:
        return print_error("deco-data", f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    common = shared.Parser(add_help=False)
    common.add_argument("--anonymous", action="store_true", help="unsigned requests, for public buckets")
    common.add_argument(
        "--requester-pays", action="store_true", help="pay for the requests, where the bucket requires it"
    )
    parser = shared.Parser(prog="deco-data", description=__doc__)
    workers_here = shared.default_workers(MAX_WORKERS)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(
        name: str, run: Callable[..., int], help: str, *positional: str, workers: bool = True
    ) -> argparse.ArgumentParser:
        parents = [] if run is _serve else [common]
        made = commands.add_parser(name, help=help, description=help, parents=parents)
        made.set_defaults(run=run)
        for argument in positional:
            made.add_argument(argument)
        if workers:
            made.add_argument("--workers", type=positive_int, default=workers_here, metavar="N", help="processes")
        return made

    packing = command("pack", _pack, "pack images with captions into tar shards, and index them")
    packing.add_argument("source", help="folder of images, parquet or tar files, or s3:// URL of tar shards")
    packing.add_argument("url", help="where the shards go: s3://bucket/prefix or a folder")
    packing.add_argument(
        "--shard-mb", type=positive, default=256.0, metavar="MB", help="size of a shard; default 256"
    )
    packing.add_argument(
        "--class-folders",
        action="store_true",
        help="SOURCE/NAME/*.jpg: the class number is NAME's position in sorted order",
    )
    packing.add_argument("--overwrite", action="store_true", help="replace shards that were packed there before")
    indexing = command("index", _index, "index the tar shards below a URL", "url")
    for scanning in (packing, indexing):
        several = functools.partial(scanning.add_argument, nargs="+", action="extend", metavar="NAME")
        several("--score", default=[], help="numeric fields of the .json to store in the index")
        several(
            "--caption-field", help="fields of the .json that contain the caption; the first one present is used"
        )
        scanning.add_argument(
            "--text", type=_suffixes, metavar="txt,json,cls", help="text members in order of preference"
        )
    indexing.add_argument("--fresh", action="store_true", help="also read shards that have not changed")
    inspecting = command("inspect", _inspect, "show the contents of an index", "url", workers=False)
    inspecting.add_argument(
        "--figures", type=Path, metavar="DIR", help="draw histograms.png and contact_sheet.png"
    )
    inspecting.add_argument(
        "--samples", type=positive_int, default=24, metavar="N", help="images on the contact sheet"
    )
    pixels: dict[str, Any] = {"type": positive_int, "metavar": "PX"}
    inspecting.add_argument(
        "--resolution", **pixels, nargs="+", default=[256, 512], help="count usable images at these"
    )
    checking = command("verify", _verify, "read all shards and compare them with the index and shards.json", "url")
    checking.add_argument("--decode", action="store_true", help="also decode every image and parse every caption")
    for listing in (packing, indexing, checking):
        listing.add_argument("--problems", type=Path, metavar="FILE", help="write all problems to this file")
    measuring = "measure how fast this machine reads and decodes samples"
    timing = command("bench", _bench, measuring, "url", workers=False)
    timing.add_argument("--seconds", type=positive, default=10.0)
    timing.add_argument("--resolution", **pixels, default=256)
    timing.add_argument("--workers", type=positive_int, nargs="+", default=[workers_here], metavar="N")
    serving = command("serve", _serve, "run the embedded S3 server until interrupted", workers=False)
    serving.add_argument("folder", type=Path)
    serving.add_argument("--bucket", default="demo")
    return parser


def _pack(args: argparse.Namespace, console: Console) -> int:
    rejects: list[Reject] = []
    start, classes = time.perf_counter(), list[str]()
    if args.class_folders:
        folder = Path(args.source).expanduser()
        classes = class_names(folder, rejects)
        samples = read_class_folders(folder, classes, rejects, workers=args.workers)
    else:
        samples = read_source(args.source, rejects, functools.partial(_store, args), workers=args.workers)
    with progress_bar(console, "packing") as update:
        report = pack(
            samples,
            _store(args, args.url),
            shard_bytes=int(args.shard_mb * 1e6),
            rejects=rejects,
            classes=classes,
            overwrite=args.overwrite,
            progress=lambda count: update(completed=count),
        )
    rate = report.samples / (time.perf_counter() - start)
    packed = f"packed {report.samples:,} samples into {len(report.shards):,} shards"
    print_line(console, f"{packed} at {args.url}, {rate:,.0f}/s")
    print_list(console, "left out", rejects)
    if not report.captioned and args.text is None:
        # Else a .json that holds only numbers would be taken for the text.
        args.text = ("cls", "txt", "json")
    args.fresh = True
    return _index(args, console, rejects)


def _index(args: argparse.Namespace, console: Console, rejects: Sequence[Reject] = ()) -> int:
    """``rejects`` are those of packing, for the list of problems."""
    given = {"caption_fields": args.caption_field, "text": args.text}
    scores = tuple(dict.fromkeys(args.score))
    settings = ScanSettings(scores=scores, **{n: tuple(v) for n, v in given.items() if v})
    start, store = time.perf_counter(), _store(args, args.url)
    with progress_bar(console, "indexing") as progress:
        index, reused = build_index(store, settings, workers=args.workers, fresh=args.fresh, progress=progress)
    save_index(store, index)
    rate = len(index) / (time.perf_counter() - start)
    print_line(
        console,
        f"indexed {len(index):,} samples in {len(index.shards):,} shards ({reused:,} unchanged), "
        f"digest {index.digest}, {rate:,.0f} samples/s",
    )
    print_list(console, "not usable", index.problems)
    _write_problems(args.problems, [*rejects, *index.problems])
    if not len(index):
        return print_error("deco-data", f"{args.url}: none of the samples is usable", 1)
    return 0


def _inspect(args: argparse.Namespace, console: Console) -> int:
    store = _store(args, args.url)
    index = load_index(store)
    summary = summarise(index)
    table = Table("quantity", "value", title=args.url)
    for name, value in facts(index, summary, args.resolution):
        table.add_row(shared.cell(name), value)
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
    print_line(console, f"wrote {histograms} and {sheet}")
    print_list(console, "samples could not be shown", problems)
    return 0


def _verify(args: argparse.Namespace, console: Console) -> int:
    start, store = time.perf_counter(), _store(args, args.url)
    with progress_bar(console, "verifying") as progress:
        report = verify(store, workers=args.workers, decode_images=args.decode, progress=progress)
    seconds = time.perf_counter() - start
    decoded = f", {report.decoded:,} decoded" if args.decode else ""
    print_line(
        console,
        f"read {report.samples:,} samples{decoded} in {report.shards:,} shards "
        f"({report.checksums:,} with a SHA-256), "
        f"{human_bytes(report.bytes)} at {report.bytes / seconds / 1e6:,.0f} MB/s",
    )
    print_list(console, "problems", report.problems)
    _write_problems(args.problems, report.problems)
    if report.problems:
        return print_error("deco-data", f"{args.url}: {len(report.problems):,} problems", 1)
    print_line(console, "everything matches the index")
    return 0


def _bench(args: argparse.Namespace, console: Console) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    table, columns = Table("quantity", title=f"{args.url} at {args.resolution} px"), []
    modes: tuple[DecodeMode, ...] = get_args(DecodeMode)
    for workers, mode in itertools.product(dict.fromkeys(args.workers), modes):
        with console.status(f"decoding {mode} with {workers} workers, {args.seconds:g} s"):
            columns.append(_measure(args, mode, workers))
        table.add_column(f"{mode}, {workers} workers", justify="right")
    for name in dict.fromkeys(name for column in columns for name in column):
        table.add_row(name, *(column.get(name, "0") for column in columns))
    console.print(table)
    return 0


def _measure(args: argparse.Namespace, mode: DecodeMode, workers: int) -> dict[str, str]:
    """Rates and counters of one rank's loader, without a model, after its first batch."""
    given = {"anonymous": args.anonymous, "requester_pays": args.requester_pays}
    cfg = DataConfig(url=args.url, decode=mode, workers=workers, **given)
    loader = Loader(cfg, resolution=args.resolution, seed=0, global_batch=BENCH_BATCH, rank=0, world=1, start=0)
    try:
        batches = iter(loader)
        next(batches)
        before, start = loader.counters, time.perf_counter()
        images, passed = 0, 0.0
        while passed < args.seconds:
            images += len(next(batches).sample_ids)
            passed = time.perf_counter() - start
        counted = {n: v - (0 if n in _GAUGES else before[n]) for n, v in loader.counters.items()}
    finally:
        loader.close()
    rates = {"images/s": images / passed, "MB/s read": counted["bytes"] / passed / 1e6}
    return {n: f"{v:,.1f}" for n, v in rates.items()} | {n: f"{v:,}" for n, v in counted.items()}


def _serve(args: argparse.Namespace, console: Console) -> int:
    with running_server(args.folder) as server:
        server.create_bucket(args.bucket)
        console.print(f"S3 at {server.endpoint}, bucket {args.bucket}, data in {server.folder}")
        console.print(f"credentials: {server.folder / 'credentials'} (access key, secret key)")
        return server.wait()


def _write_problems(path: Path | None, problems: Sequence[object]) -> None:
    if path is not None:
        path.write_text("".join(f"{printable(problem)}\n" for problem in problems), encoding="utf-8")


def _store(args: argparse.Namespace, url: str) -> Store:
    return open_store(url, Access(anonymous=args.anonymous, requester_pays=args.requester_pays))


def _suffixes(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(TEXT_SUFFIXES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(TEXT_SUFFIXES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
