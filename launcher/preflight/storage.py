"""Checks of what a node can reach: the run's folder, checkpoints in an object store, room, data, encoders."""

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.parse import urlparse

import google_crc32c
import torch.distributed as dist

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.index.format import load_index
from data_pipeline.storage.base import open_store
from data_pipeline.storage.files import write_durably
from data_pipeline.stream.loader import access_of
from deco_scale.checkpoint.storage import LocalStorage
from deco_scale.cli.workload import workload
from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import broadcast_object, gather_objects
from deco_scale.parallel.config import ParallelConfig
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.memory import state_bytes
from launcher.preflight.report import Check, RankInfo, check_same, format_range, problems_by_rank

PROBE_BYTES = 16 * 2**20
SHARED_WAIT_S = 60.0
"""NFS clients may keep an old listing of a folder for up to a minute (acdirmax of nfs(5))."""
_STORED_PARTS = ("weights", "moments", "average")
_FAILED = "failed: "


def checkpoint_bytes(cfg: RunConfig) -> tuple[int, int]:
    """Bytes of a checkpoint (weights, two moments, EMA; fp32; no EMA of the REPA head) and of an export (EMA)."""
    parts = state_bytes(workload(cfg)[0], ParallelConfig(), ParallelDims(1, 1))
    return round(sum(parts[name] for name in _STORED_PARTS)), round(parts["average"])


def max_checkpoints(cfg: RunConfig) -> tuple[int, int]:
    """Checkpoints and exports in the run's folder at most, over all of its stages.

    Checkpoints: the last ones, every ``keep_every``-th, the best, the one that a run went on from, and the one
    being written; with ``checkpoint.url`` only the last of these.
    """
    settings, steps = cfg.checkpoint, sum(stage.steps for stage in cfg.stages)
    every = steps // settings.keep_every if settings.keep_every else 0
    best = settings.keep_best.count if settings.keep_best is not None else 0
    exports = steps // settings.ema_every if settings.ema_every else 0
    retained = 0 if settings.url is not None else settings.keep_last + every + best + 1
    return min(retained + 1, -(-steps // settings.every)), exports + len(settings.ema_steps)


def check_storage(cfg: RunConfig, ranks: Sequence[RankInfo]) -> list[Check]:
    """The run's folder on every node, the object store of checkpoints, and room. All ranks together."""
    folder, url = Path(cfg.run.dir), cfg.checkpoint.url
    return [
        _disk_check(folder, ranks),
        _shared_check(folder, ranks),
        *([_objects_check(url, ranks)] if url is not None else []),
        _room_check(cfg, folder, ranks),
    ]


def check_data(cfg: RunConfig, ranks: Sequence[RankInfo]) -> list[Check]:
    """Index, first sample, text embeddings and encoders of every data set, read on every node; a collective."""
    leaders = [rank for rank in ranks if rank.local_rank == 0]
    all_facts = gather_objects(_data_facts(cfg) if ranks[dist.get_rank()] in leaders else {})
    facts = [all_facts[rank.rank] for rank in leaders]
    checks = []
    for name, value, problems in check_same(facts, leaders, advice="let all nodes read the same data"):
        failed = problems_by_rank(
            leaders,
            (each.get(name, "") for each in facts),
            lambda fact: fact.removeprefix(_FAILED) if fact.startswith(_FAILED) else None,
        )
        checks.append(Check(name, value.removeprefix(_FAILED), failed or problems))
    return checks


def _data_facts(cfg: RunConfig) -> dict[str, str]:
    """What this node reads of each data set, text embeddings and encoder, or why it cannot."""
    facts = {}

    def note(name: str, probe: Callable[..., str], *arguments: object) -> None:
        try:
            facts[name] = probe(*arguments)
        except DataError as error:
            facts[name] = f"{_FAILED}{error}"

    for source in cfg.data.sources:
        note(source.url, _index_fact, source.url, cfg.data)
        if source.text_states:
            note(source.text_states, _states_fact, source.text_states, cfg.data)
    for stage in cfg.stages:
        if stage.data is not None:
            note(stage.data, _index_fact, stage.data, cfg.data)
    if cfg.text_encoder is not None and not cfg.data.has_text_embeddings:
        note("text_encoder.path", _path_fact, cfg.text_encoder.path, cfg.text_encoder.allow_download)
    if cfg.image_encoder is not None and cfg.objective.repa_weight > 0:
        note("image_encoder.path", _path_fact, cfg.image_encoder.path, False)
    return facts


def _index_fact(url: str, data: DataConfig) -> str:
    """How much there is; the first sample is read and its checksum compared."""
    store = open_store(url, access_of(data))
    index = load_index(store)
    sample = index.locate(0)
    shard = index.shards[sample.shard]
    raw = store.read(shard.key, sample.start, sample.end - sample.start)
    if google_crc32c.value(raw) != sample.crc32c:
        raise DataError(f"{url}/{shard.key} does not match its index; run: deco-data index {url}")
    return f"{len(index):,} samples in {len(index.shards):,} shards, index {index.digest}"


def _states_fact(url: str, data: DataConfig) -> str:
    if next(iter(open_store(url, access_of(data)).list()), None) is None:
        raise DataError(f"{url} is empty; run: deco embed")
    return "reachable"


def _path_fact(path: str, may_download: bool) -> str:
    if Path(path).expanduser().exists():
        return f"{path} is here"
    # One slash may be a name of the hub, which its own cache answers when it is loaded.
    if may_download or (path.count("/") <= 1 and not path.startswith((".", "~", "/"))):
        return f"{path} is no folder: taken for a name of the hub"
    raise DataError(f"{path} is not there; copy the encoder to this node")


def _on_each_node(
    name: str, unit: str, action: Callable[[], float], ranks: Sequence[RankInfo], *, advice: str
) -> Check:
    """``action`` on one rank of every node, returning a measured value; named errors become problems."""
    outcome: float | str | None = None
    if ranks[dist.get_rank()].local_rank == 0:
        try:
            outcome = action()
        except DataError as error:
            outcome = str(error)
        except OSError as error:
            outcome = f"{error.filename or name}: {error.strerror}"
    outcomes = gather_objects(outcome)
    failed = problems_by_rank(ranks, outcomes, lambda o: f"{o}; {advice}" if isinstance(o, str) else None)
    good = [(rank, speed) for rank, speed in zip(ranks, outcomes, strict=True) if isinstance(speed, float)]
    value = format_range([speed for _, speed in good], [rank for rank, _ in good], unit) if good else "failed"
    return Check(name, value, failed)


def _round_trip(
    where: object, data: bytes, write: Callable[[bytes], object], read: Callable[[], bytes | None]
) -> tuple[float, float]:
    """Seconds until ``data`` were written, and until they were read back."""
    start = time.perf_counter()
    write(data)
    written = time.perf_counter()
    if read() != data:
        raise DataError(f"{where}: other bytes came back than were written")
    return written - start, time.perf_counter() - start


def _disk_check(folder: Path, ranks: Sequence[RankInfo]) -> Check:
    me = ranks[dist.get_rank()]
    path = folder / f".preflight_{me.host}_{me.rank}"

    def write_and_read() -> float:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            write = partial(write_durably, path)
            return PROBE_BYTES / _round_trip(path, os.urandom(PROBE_BYTES), write, path.read_bytes)[0] / 1e6
        finally:
            path.unlink(missing_ok=True)

    advice = "make run.dir writable there, or set another"
    return _on_each_node(f"write and read {folder}", "MB/s written", write_and_read, ranks, advice=advice)


def _shared_check(folder: Path, ranks: Sequence[RankInfo]) -> Check:
    """Whether all nodes see one folder: what rank 0 writes, every node must read."""
    me, token = ranks[dist.get_rank()], broadcast_object(secrets.token_hex(16))
    path = folder / f".preflight_shared_{token}"
    written = False
    if me.rank == 0:
        with suppress(OSError):  # the row before says why
            written = path.write_text(token, encoding="ascii") > 0
    if not broadcast_object(written):
        return Check("one folder for all nodes", "not checked: rank 0 cannot write")
    seen = gather_objects(me.local_rank != 0 or _appears(path, token))
    if me.rank == 0:
        path.unlink(missing_ok=True)
    advice = f"run.dir={folder} is not the folder that {ranks[0]} sees; checkpoints need a shared file system"
    problems = problems_by_rank(ranks, seen, lambda shared: None if shared else advice)
    return Check("one folder for all nodes", "no" if problems else "yes", problems)


def _appears(path: Path, text: str) -> bool:
    deadline = time.monotonic() + SHARED_WAIT_S
    while True:
        try:
            return path.read_text(encoding="ascii") == text
        except OSError:
            # A folder that is not there at all will not appear.
            if not path.parent.is_dir() or time.monotonic() > deadline:
                return False
            time.sleep(0.5)


def _objects_check(url: str, ranks: Sequence[RankInfo]) -> Check:
    me, size = ranks[dist.get_rank()], PROBE_BYTES // 16
    key = f".preflight/{hashlib.sha256(f'{me.host} {me.rank}'.encode()).hexdigest()[:16]}"

    def write_and_read() -> float:
        store = open_store(url)
        try:
            write, read = partial(store.write, key), partial(store.read_all, key)
            return size / _round_trip(f"{url}/{key}", os.urandom(size), write, read)[1] / 1e6
        finally:
            store.delete(key)

    advice = f"check its AWS settings and the rights on bucket {urlparse(url).netloc}"
    return _on_each_node(f"write and read {url}", "MB/s both ways", write_and_read, ranks, advice=advice)


def _room_check(cfg: RunConfig, folder: Path, ranks: Sequence[RankInfo]) -> Check:
    (one, export), (count, exports) = checkpoint_bytes(cfg), max_checkpoints(cfg)
    here = len(LocalStorage(folder / "checkpoints").steps())
    # Those that lie here have their rank already; the next needs its own in any case.
    need = one * max(count - here, 1) + export * exports
    free = broadcast_object(shutil.disk_usage(folder).free if folder.is_dir() else None)
    value = f"{_gib(one)} each, at most {count} checkpoints and {exports} exports, {here} here"
    if free is None:
        return Check("room for checkpoints", f"{value}; not checked: no folder")
    problem = (
        f"{ranks[0]}: {_gib(free)} are free in {folder}, {_gib(need)} are needed; make room, or lower "
        "checkpoint.keep_last, keep_best, or raise keep_every and ema_every"
    )
    return Check("room for checkpoints", f"{value}; {_gib(free)} free", [problem] if free < need else [])


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
