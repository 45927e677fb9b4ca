"""Checks of what a node can reach: the run's folder, checkpoints in an object store, room, data, encoders."""

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlparse

import google_crc32c
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.index import load_index
from data_pipeline.loader import access_of
from data_pipeline.settings import DataConfig
from data_pipeline.store import Store, open_store
from deco_scale.config import RunConfig
from deco_scale.parallel.layout import Layout, ParallelConfig
from deco_scale.plan_command import workload
from deco_scale.planning.memory import state_bytes
from deco_scale.training.storage import FolderTarget
from launcher.preflight_report import Group, Place, Row, gathered, same_everywhere, span

PROBE_BYTES = 16 * 2**20
SHARED_WAIT_S = 60.0
"""NFS clients may keep an old listing of a folder for up to a minute (acdirmax of nfs(5))."""
_STORED_PARTS = ("weights", "moments", "average")


def checkpoint_bytes(cfg: RunConfig) -> int:
    """Of one checkpoint: weights, two moments and average in fp32; of the REPA head no average."""
    work, _ = workload(cfg)
    parts = state_bytes(work, ParallelConfig(), Layout(1, 1))
    return round(sum(parts[name] for name in _STORED_PARTS))


def export_bytes(cfg: RunConfig) -> int:
    """Of one export of the averaged weights, in fp32."""
    work, _ = workload(cfg)
    return round(state_bytes(work, ParallelConfig(), Layout(1, 1))["average"])


def most_checkpoints(cfg: RunConfig) -> tuple[int, int]:
    """Checkpoints and exports that lie in the run's folder at most, over all of its stages.

    Checkpoints: the last ones, every ``keep_every``-th, the best, the one that a run went on from, and the one
    being written; with ``checkpoint.url`` only the last of these.
    """
    settings, steps = cfg.checkpoint, sum(stage.steps for stage in cfg.stages)
    every = steps // settings.keep_every if settings.keep_every else 0
    best = settings.keep_best.count if settings.keep_best is not None else 0
    exports = steps // settings.ema_every if settings.ema_every else 0
    kept = 0 if settings.url is not None else settings.keep_last + every + best + 1
    return min(kept + 1, -(-steps // settings.every)), exports + len(settings.ema_steps)


def free_on_disk(folder: Path) -> int:
    """Bytes that an unprivileged user may still write there."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def check_storage(
    cfg: RunConfig,
    places: Sequence[Place],
    *,
    free_bytes: Callable[[Path], int],
    shared_wait_s: float = SHARED_WAIT_S,
) -> Group:
    """The run's folder on every node, the object store of checkpoints, and room. All ranks together."""
    folder, me = Path(cfg.run.dir), places[dist.get_rank()]
    rows = [_disk_row(folder, me, places), _shared_row(folder, me, places, shared_wait_s)]
    if cfg.checkpoint.url is not None:
        rows.append(_objects_row(cfg.checkpoint.url, me, places))
    rows.append(_room_row(cfg, folder, places, free_bytes))
    return Group("storage", tuple(rows))


def check_data(cfg: RunConfig, places: Sequence[Place]) -> Group:
    """Index and first sample of every data set, text states and encoders, from every node. All ranks together."""
    me = places[dist.get_rank()]
    facts = gathered(_data_facts(cfg) if me.local_rank == 0 else {})
    leaders = [place for place in places if place.local_rank == 0]
    told = [facts[place.rank] for place in leaders]
    rows = []
    for row in same_everywhere(told, leaders, advice="let all nodes read the same data"):
        each = [(place, found.get(row.check, "")) for place, found in zip(leaders, told, strict=True)]
        failed = [(place, what.removeprefix(_FAILED)) for place, what in each if what.startswith(_FAILED)]
        problems = tuple(f"{place}: {what}" for place, what in failed) or row.problems
        rows.append(Row(row.check, row.value.removeprefix(_FAILED), problems))
    return Group("data", tuple(rows))


_FAILED = "failed: "


def _data_facts(cfg: RunConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in cfg.data.sources:
        found[source.url] = _index_fact(source.url, cfg.data)
        if source.text_states:
            found[source.text_states] = _states_fact(source.text_states, cfg.data)
    for stage in cfg.stages:
        if stage.data is not None:
            found[stage.data] = _index_fact(stage.data, cfg.data)
    if cfg.text_encoder is not None and not cfg.data.has_text_states:
        found["text_encoder.path"] = _path_fact(cfg.text_encoder.path, cfg.text_encoder.allow_download)
    if cfg.image_encoder is not None and cfg.objective.repa_weight > 0:
        found["image_encoder.path"] = _path_fact(cfg.image_encoder.path, False)
    return found


def _index_fact(url: str, data: DataConfig) -> str:
    """How much there is; the first sample is read and its checksum compared."""
    try:
        store = open_store(url, access_of(data))
        index = load_index(store)
        place = index.locate(0)
        shard = index.shards[place.shard]
        raw = store.read(shard.key, place.start, place.end - place.start)
    except DataError as error:
        return f"{_FAILED}{error}"
    if google_crc32c.value(raw) != place.crc32c:
        return f"{_FAILED}{url}/{shard.key} does not hold what its index says; run: deco-data index {url}"
    return f"{len(index):,} samples in {len(index.shards):,} shards, index {index.digest}"


def _states_fact(url: str, data: DataConfig) -> str:
    try:
        first = next(iter(open_store(url, access_of(data)).list()), None)
    except DataError as error:
        return f"{_FAILED}{error}"
    return "reachable" if first is not None else f"{_FAILED}{url} is empty; run: deco embed"


def _path_fact(path: str, may_download: bool) -> str:
    if Path(path).expanduser().exists():
        return f"{path} is here"
    # One slash may be a name of the hub, which its own cache answers when it is loaded.
    if may_download or (path.count("/") <= 1 and not path.startswith((".", "~", "/"))):
        return f"{path} is no folder: taken for a name of the hub"
    return f"{_FAILED}{path} is not there; copy the encoder to this node"


def _each_leader(
    check: str, unit: str, action: Callable[[], float], me: Place, places: Sequence[Place], advice: str
) -> Row:
    """``action`` on one rank of every node, returning a measured value; named errors become problems."""
    outcome: float | str | None = None
    if me.local_rank == 0:
        try:
            outcome = action()
        except DataError as error:
            outcome = str(error)
        except OSError as error:
            outcome = f"{error.filename or check}: {error.strerror}"
    everywhere = list(zip(places, gathered(outcome), strict=True))
    failed = tuple(f"{place}: {what}; {advice}" for place, what in everywhere if isinstance(what, str))
    good = [(place, what) for place, what in everywhere if isinstance(what, float)]
    value = span([what for _, what in good], [place for place, _ in good], unit) if good else "failed"
    return Row(check, value, failed)


def _disk_row(folder: Path, me: Place, places: Sequence[Place]) -> Row:
    def write_and_read() -> float:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f".preflight_{me.host}_{me.rank}"
        data, start = os.urandom(PROBE_BYTES), time.perf_counter()
        try:
            with path.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            seconds = time.perf_counter() - start
            if path.read_bytes() != data:
                raise DataError(f"{path}: other bytes came back than were written")
        finally:
            path.unlink(missing_ok=True)
        return PROBE_BYTES / seconds / 1e6

    advice = "make run.dir writable there, or set another"
    return _each_leader(f"write and read {folder}", "MB/s written", write_and_read, me, places, advice)


def _shared_row(folder: Path, me: Place, places: Sequence[Place], wait_s: float) -> Row:
    """Whether all nodes see one folder: what rank 0 writes, every node must read."""
    token = gathered(secrets.token_hex(16))[0]
    path = folder / f".preflight_shared_{token}"
    try:
        if me.rank == 0:
            path.write_text(token, encoding="ascii")
        written = True
    except OSError:
        # The row before says why.
        written = False
    if not all(gathered(written)):
        return Row("one folder for all nodes", "not checked: rank 0 cannot write", ())
    seen = me.local_rank != 0 or _appears(path, token, wait_s)
    everywhere = gathered(seen)
    if me.rank == 0:
        path.unlink(missing_ok=True)
    blind = [place for place, found in zip(places, everywhere, strict=True) if not found]
    advice = f"run.dir={folder} is not the folder that {places[0]} sees; checkpoints need a shared file system"
    return Row("one folder for all nodes", "yes" if not blind else "no", tuple(f"{p}: {advice}" for p in blind))


def _appears(path: Path, text: str, wait_s: float) -> bool:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            return path.read_text(encoding="ascii") == text
        except OSError:
            # A folder that is not there at all will not appear.
            if not path.parent.is_dir() or time.monotonic() > deadline:
                return False
            time.sleep(0.5)


def _objects_row(url: str, me: Place, places: Sequence[Place]) -> Row:
    def write_and_read() -> float:
        store: Store = open_store(url)
        key = f".preflight/{hashlib.sha256(f'{me.host} {me.rank}'.encode()).hexdigest()[:16]}"
        data, start = os.urandom(PROBE_BYTES // 16), time.perf_counter()
        try:
            store.write(key, data)
            if store.read(key, 0, len(data)) != data:
                raise DataError(f"{url}/{key}: other bytes came back than were written")
        finally:
            store.delete(key)
        return len(data) / (time.perf_counter() - start) / 1e6

    advice = f"check its AWS settings and the rights on bucket {urlparse(url).netloc}"
    return _each_leader(f"write and read {url}", "MB/s both ways", write_and_read, me, places, advice)


def _room_row(cfg: RunConfig, folder: Path, places: Sequence[Place], free_bytes: Callable[[Path], int]) -> Row:
    one, export = checkpoint_bytes(cfg), export_bytes(cfg)
    count, exports = most_checkpoints(cfg)
    here = len(FolderTarget(folder / "checkpoints").steps())
    # Those that lie here have their place already; the next needs its own in any case.
    need = one * max(count - here, 1) + export * exports
    mine = free_bytes(folder) if folder.is_dir() else None
    free = gathered(mine)[0]
    value = f"{_gib(one)} each, {count} checkpoints and {exports} exports at most, {here} here"
    if free is None:
        return Row("room for checkpoints", f"{value}; not checked: no folder", ())
    problem = (
        f"{places[0]}: {_gib(free)} are free in {folder}, {_gib(need)} are needed; make room, or lower "
        "checkpoint.keep_last, keep_best, or raise keep_every and ema_every"
    )
    return Row("room for checkpoints", f"{value}; {_gib(free)} free", (problem,) if free < need else ())


def _gib(count: int) -> str:
    return f"{count / 2**30:,.3f} GiB"
