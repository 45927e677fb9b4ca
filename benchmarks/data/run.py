"""How fast samples come from S3 to pixels: ours, plain webdataset, and bare decoding as the limit, in one run.

    python -m benchmarks.data                      # about 4 minutes
    python -m benchmarks.data --big                # also an index of 100 M samples (needs 8 GB of memory)

Photographs of 1024 x 768 (JPEG, quality 90) lie as tar shards in a real S3 server on this machine. Each
contender runs in a process of its own on the same cores, the server on the others; rounds interleave, medians
count. ``webdataset`` is a plain pipeline of that library with the public release's preprocessing, reading the same
shards through boto3. Bare decoding is the same function in a loop over images in memory.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import record
from data_pipeline.config import DataConfig
from data_pipeline.decode import DecodeMode, decode
from data_pipeline.errors import Reject
from data_pipeline.index.build import build_index, save_index
from data_pipeline.index.format import COLUMNS, make_index, parse_index, write_index
from data_pipeline.pack.readers import read_folder
from data_pipeline.pack.writer import pack
from data_pipeline.storage.base import ObjectInfo, open_store
from data_pipeline.storage.dev_server import S3Server, running_server
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.sampler import ElasticSampler
from launcher.demo.dataset import SUBJECTS, photograph

URL = "s3://bench/set"
SIZE, SIDE, BATCH = (1024, 768), 256, 32
MAX_PIXELS = 64 * 2**20
CONTENDERS = ("bare exact", "ours exact", "webdataset", "bare fast", "ours fast")


def write_images(folder: Path, count: int) -> None:
    """Crops of the demo's photographs, enlarged to ``SIZE``, each with a caption."""
    random = np.random.default_rng(0)
    sources = [photograph(subject) for subject in SUBJECTS]
    for i in range(count):
        image = sources[i % len(sources)]
        width = int(min(image.width, image.height * 4 / 3) * random.uniform(0.7, 1.0))
        height = width * 3 // 4
        left, top = (int(random.integers(n + 1)) for n in (image.width - width, image.height - height))
        box = (left, top, left + width, top + height)
        image.resize(SIZE, Image.Resampling.LANCZOS, box=box).save(folder / f"{i:04d}.jpg", quality=90)
        (folder / f"{i:04d}.txt").write_text(SUBJECTS[i % len(SUBJECTS)].words)


def bare(mode: DecodeMode) -> Iterator[int]:
    """Images decoded in a loop, from memory."""
    store = open_store(URL)
    index = parse_index(np.frombuffer(store.read_all("index.safetensors") or b"", np.uint8), URL)
    images = []
    for sample in range(len(index)):
        place = index.locate(sample)
        raw = store.read(index.shards[place.shard].key, place.start, place.end - place.start)
        images.append(raw[place.image])
    yield 0
    while True:
        for image in images:
            decode(image, (SIDE, SIDE), mode=mode, max_pixels=MAX_PIXELS)
            yield 1


def ours(mode: DecodeMode) -> Iterator[int]:
    """Batches of our loader, one rank."""
    cfg = DataConfig(url=URL, decode=mode, workers=len(os.sched_getaffinity(0)), fetchers=2, ahead=64)
    loader = Loader(cfg, resolution=SIDE, seed=0, global_batch=BATCH, rank=0, world=1, start=0)
    batches = iter(loader)
    next(batches)
    yield 0
    for batch in batches:
        yield len(batch.sample_ids)


def plain_webdataset() -> Iterator[int]:
    """The library's pipeline as a user would write it, with the release's preprocessing; no shell, no pickle."""
    import boto3
    import webdataset as wds
    from webdataset.tariterators import tar_file_expander

    client = boto3.client("s3")
    keys = [info.key for info in open_store(URL).list() if info.key.endswith(".tar")]

    def opened(shards: Any) -> Iterator[dict[str, Any]]:
        for shard in shards:
            body = client.get_object(Bucket="bench", Key=f"set/{shard['url']}")["Body"]
            yield {"url": shard["url"], "stream": body}

    def prepare(sample: dict[str, Any]) -> tuple[Any, str]:
        image = Image.open(io.BytesIO(sample["jpg"])).convert("RGB")
        while min(*image.size) >= 2 * SIDE:
            image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
        scale = SIDE / min(*image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        pixels = np.array(image)
        top, left = (pixels.shape[0] - SIDE) // 2, (pixels.shape[1] - SIDE) // 2
        # The release hands out floats in [-1, 1], channels first; ours makes them on the device.
        floats = pixels[top : top + SIDE, left : left + SIDE].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1.0
        return floats, sample["txt"].decode()

    pipeline = wds.DataPipeline(
        wds.ResampledShards(keys, seed=0),
        opened,
        tar_file_expander,
        wds.tariterators.group_by_keys,
        wds.shuffle(100),
        wds.map(prepare),
        wds.batched(BATCH),
    )
    batches = iter(pipeline)
    next(batches)
    yield 0
    for images, _ in batches:
        yield len(images)


def contender(name: str, seconds: float, cores: list[int]) -> dict[str, float]:
    """Images/s, CPU seconds per image; called in a process of its own."""
    os.sched_setaffinity(0, cores)
    kind, _, mode = name.partition(" ")
    work: Iterator[int] = plain_webdataset() if kind == "webdataset" else {"bare": bare, "ours": ours}[kind](mode)  # type: ignore[arg-type]
    next(work)
    images, began, used = 0, time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - began) < seconds:
        images += next(work)
    return {"images_per_s": images / elapsed, "cpu_ms": 1e3 * (time.process_time() - used) / images}


def compare(server: S3Server, seconds: float, rounds: int, cores: list[int], console: Console) -> dict[str, Any]:
    """Medians over interleaved rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    environment = {**os.environ, **server.environment, "PYTHONPATH": str(record.ROOT)}
    for number in range(rounds):
        for name in CONTENDERS:
            console.print(f"round {number + 1}/{rounds}: {name}", highlight=False)
            arguments = [sys.executable, "-m", "benchmarks.data", "--contender", name, "--seconds", str(seconds)]
            arguments += ["--cores", ",".join(map(str, cores))]
            out = subprocess.run(
                arguments, env=environment, cwd=record.ROOT, check=True, capture_output=True, text=True
            )
            found[name].append(json.loads(out.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()
    }


def big_index(samples: int) -> dict[str, float]:
    """Size, load and seek times of an index of random content."""
    per_shard = 10_000
    shards = [ObjectInfo(f"shard-{i:06d}.tar", 2**30, f"{i:032x}") for i in range(samples // per_shard)]
    columns = {name: np.zeros(samples, dtype=dtype) for name, dtype in COLUMNS.items()}
    columns["start"][:] = np.tile(np.arange(per_shard, dtype=np.uint32) * 200, len(shards))
    columns["length"][:] = 200
    with tempfile.TemporaryDirectory() as scratch:
        store = open_store(scratch)
        write_index(store, make_index(shards, [per_shard] * len(shards), columns, header={"scan": {}}))
        del columns
        path = Path(scratch) / "index.safetensors"
        size = path.stat().st_size
        began = time.perf_counter()
        index = parse_index(np.memmap(path, np.uint8, "r"), scratch)
        loaded = time.perf_counter()
        order = ElasticSampler(index, seed=1, streams=1024, window=256)
        cut = time.perf_counter()
        order.at(0)
        built = time.perf_counter()
        order.at(samples // 2)
        sought = time.perf_counter()
        count = 4096
        for i in range(count):
            order.at((samples // 2 + i) % samples)
        ended = time.perf_counter()
    # An epoch's order of the chunks is as large again.
    private = 2 * (order.chunks.first.nbytes + order.chunks.size.nbytes)
    return {
        "samples": samples,
        "index_bytes_per_sample": size / samples,
        "private_mb_per_process": private / 1e6,
        "load_and_check_s": loaded - began,
        "chunks_s": cut - loaded,
        "epoch_permutation_s": built - cut,
        "seek_ms": 1e3 * (sought - built),
        "us_per_sample": 1e6 * (ended - sought) / count,
    }


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    result = action()
    return result, time.perf_counter() - began


def show(results: dict[str, Any], console: Console) -> None:
    speeds = results["contenders"]
    table = Table("contender", "images/s", "CPU ms an image", "of bare", "of webdataset", title="1024x768 to 256")
    for name, run in speeds.items():
        limit = speeds["bare fast" if name.endswith("fast") else "bare exact"]["images_per_s"]
        ratios = [run["images_per_s"] / limit, run["images_per_s"] / speeds["webdataset"]["images_per_s"]]
        table.add_row(name, f"{run['images_per_s']:.0f}", f"{run['cpu_ms']:.1f}", *(f"{r:.2f}" for r in ratios))
    console.print(table)
    console.print(f"index: {results['index_samples_per_s']:,.0f} samples/s with one process")
    for key, value in results.get("big_index", {}).items():
        console.print(f"  {key}: {value:,.2f}", highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", "--pictures", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", help="cores of the contenders, such as 0 or 0,1 (default: half of them)")
    parser.add_argument("--big", action="store_true", help="also an index of 100 M samples")
    parser.add_argument("--out", type=Path, default=record.RESULTS)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    every = sorted(os.sched_getaffinity(0))
    cores = [int(c) for c in args.cores.split(",")] if args.cores else every[: max(1, len(every) // 2)]
    if args.contender:
        print(json.dumps(contender(args.contender, args.seconds, cores)))
        return 0
    console = Console()
    # The server is started on what is left; it inherits this.
    os.sched_setaffinity(0, [c for c in every if c not in cores] or every)
    with tempfile.TemporaryDirectory() as scratch, running_server(Path(scratch) / "s3") as server:
        server.create_bucket("bench")
        os.environ.update(server.environment)
        images = Path(scratch) / "images"
        images.mkdir()
        write_images(images, args.images)
        store, rejects = open_store(URL), list[Reject]()
        pack(read_folder(images, rejects), store, shard_bytes=8 * 10**6, rejects=rejects)
        (index, _), seconds = timed(lambda: build_index(store))
        save_index(store, index)
        results: dict[str, Any] = {
            **record.origin(),
            "cores": f"{len(every)}, contenders on {len(cores)}",
            "rounds": args.rounds,
            "index_samples_per_s": len(index) / seconds,
            "contenders": compare(server, args.seconds, args.rounds, cores, console),
        }
    if args.big:
        os.sched_setaffinity(0, every)
        results["big_index"] = big_index(100_000_000)
    show(results, console)
    record.write(results, args.out, "data", console)
    return 0
