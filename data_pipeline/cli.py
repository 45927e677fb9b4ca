"""The ``deco-data`` command: pack, index, inspect, serve. Exit codes: 0 done, 1 failed, 2 wrong use."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data_pipeline.errors import DataError
from data_pipeline.index import build_index, load_index, save_index
from data_pipeline.pack import pack, read_folder, read_parquet
from data_pipeline.serve import running_server
from data_pipeline.store import open_store

LISTED = 20
"""Problems listed by name; the rest are counted."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="deco-data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    packing = commands.add_parser("pack", help="folder or parquet to tar shards, and their index")
    packing.add_argument("source", type=Path)
    packing.add_argument("url")
    packing.add_argument("--shard-mb", type=float, default=256.0)
    for name, text in (("index", "index the shards below a URL"), ("inspect", "show an index")):
        commands.add_parser(name, help=text).add_argument("url")
    serving = commands.add_parser("serve", help="run the embedded S3 server until interrupted")
    serving.add_argument("folder", type=Path)
    serving.add_argument("--bucket", default="demo")
    args = parser.parse_args(argv)
    console = Console()
    try:
        if args.command == "pack":
            _pack(args.source, args.url, args.shard_mb, console)
        if args.command in ("pack", "index"):
            return _index(args.url, console)
        if args.command == "inspect":
            return _inspect(args.url, console)
        return _serve(args.folder, args.bucket, console)
    except DataError as error:
        print(f"deco-data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _pack(source: Path, url: str, shard_mb: float, console: Console) -> None:
    if not source.exists():
        raise DataError(f"{source}: no such folder or file")
    skipped: list[str] = []
    reader = read_folder if source.is_dir() else read_parquet
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("packing", total=None)
        report = pack(
            reader(source, skipped),
            open_store(url),
            shard_bytes=int(shard_mb * 1e6),
            skipped=skipped,
            progress=lambda count: progress.update(task, completed=count),
        )
    console.print(f"packed {report.samples} samples into {len(report.shards)} shards at {url}")
    _list(console, "left out", report.skipped)


def _index(url: str, console: Console) -> int:
    store = open_store(url)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("indexing", total=None)
        index, report = build_index(
            store,
            progress=lambda key, done, total: progress.update(
                task, completed=done, total=total, description=f"indexing {key}"
            ),
        )
    save_index(store, index)
    console.print(f"indexed {len(index)} samples in {len(index.shards)} shards, digest {index.digest}")
    _list(console, "not usable", report.problems)
    return 0 if len(index) else 1


def _inspect(url: str, console: Console) -> int:
    index = load_index(open_store(url))
    side = np.minimum(index.columns["height"], index.columns["width"])
    table = Table("quantity", "value", title=url)
    table.add_row("digest", index.digest)
    table.add_row("shards", str(len(index.shards)))
    table.add_row("samples", str(len(index)))
    table.add_row("bytes", f"{sum(s.size for s in index.shards):,}")
    for share in (0, 50, 100):
        table.add_row(f"short side, {share}% quantile", f"{int(np.percentile(side, share))} px")
    for resolution in (256, 512):
        table.add_row(f"usable at {resolution} px", str(int((side >= resolution).sum())))
    console.print(table)
    return 0


def _serve(folder: Path, bucket: str, console: Console) -> int:
    with running_server(folder) as server:
        server.create_bucket(bucket)
        console.print(f"S3 at {server.endpoint}, bucket {bucket}, data in {server.folder}")
        console.print(f"credentials: {server.folder / 'credentials'} (access key, secret key)")
        return server.wait()


def _list(console: Console, what: str, problems: list[str]) -> None:
    if problems:
        console.print(f"{len(problems)} {what}:")
        for problem in problems[:LISTED]:
            console.print(f"  {problem}", markup=False)
        if len(problems) > LISTED:
            console.print(f"  and {len(problems) - LISTED} more")


if __name__ == "__main__":
    sys.exit(main())
