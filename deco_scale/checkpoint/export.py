"""The EMA of the denoiser as one safetensors file, gathered to rank 0 tensor by tensor."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.storage.files import make_durable, write_durably
from deco_scale.checkpoint.async_save import CheckpointGroup
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.staging import Snapshot
from deco_scale.checkpoint.storage import SAVING
from deco_scale.errors import RunError
from deco_scale.parallel.engines.base import EMA_PREFIX

PREFIX = f"ema.{EMA_PREFIX}"
WEIGHTS, SETTINGS = "model.safetensors", "config.json"


@dataclasses.dataclass(frozen=True, order=True)
class _Piece:
    """A box of a tensor, and the rank that sends it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int


def export_name(step: int) -> str:
    return f"ema_step_{step:08d}"


def export_ema(snapshot: Snapshot, meta: CheckpointMeta, folder: Path, team: CheckpointGroup) -> Path:
    """Write ``ema_step_XXXXXXXX/`` in ``folder``: fp32 weights by the plain denoiser's names, and ``config.json``.

    Rank 0 writes and holds one tensor at a time, the others send their parts of it. Raises :class:`RunError` on
    every rank where the disk refuses; then nothing is left behind.
    """
    final = folder / export_name(meta.step)
    temporary = folder / f"{SAVING}{final.name}"
    shapes, pieces = _layout(snapshot, team)
    problem: OSError | None = None
    file: BinaryIO | None = None
    try:
        if team.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            file = (temporary / WEIGHTS).open("wb")
            file.write(_header(shapes))
    except OSError as error:
        problem = error
    for tensor in _gathered(snapshot, shapes, pieces, team):
        # After an error the ranks still send what they were about to.
        if file is not None and problem is None:
            try:
                file.write(tensor.reshape(-1).numpy().tobytes())
            except OSError as error:
                problem = error

    def finish() -> None:
        try:
            if problem is not None:
                raise problem
            if file is not None:
                _finish(file, temporary, final, meta)
        except OSError as error:
            raise RunError(f"{error.filename or final}: {error.strerror}") from error

    try:
        team.agree(finish)
    finally:
        if file is not None:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                file.close()
    return final


def _finish(file: BinaryIO, temporary: Path, final: Path, meta: CheckpointMeta) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
    objective = meta.config.get("objective") or {}
    settings = {
        "model": meta.config.get("model"),
        "prediction": objective.get("prediction", "velocity"),
        "t_eps": objective.get("t_eps", 0.05),
        "weights": "ema",
        "dtype": "float32",
        "provenance": {"step": meta.step, "stage": meta.stage, "samples": meta.samples},
    }
    write_durably(temporary / SETTINGS, json.dumps(settings, indent=1).encode())
    make_durable(temporary)
    if final.exists():
        shutil.rmtree(final)
    os.rename(temporary, final)
    make_durable(final.parent)


def _layout(
    snapshot: Snapshot, team: CheckpointGroup
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[_Piece]]]:
    """Shapes by plain name, and the pieces that fill each, every one from the lowest rank that has it."""
    mine = []
    for item in snapshot.plan.items:
        if item.index.fqn.startswith(PREFIX):
            data = item.tensor_data
            assert data is not None
            box = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
            mine.append((item.index.fqn.removeprefix(PREFIX), tuple(data.size), *box))
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, dict[tuple[int, ...], _Piece]] = {}
    for rank, found in enumerate(team.gather(mine)):
        for name, shape, offsets, sizes in found:
            shapes[name] = shape
            if prod(sizes):
                boxes.setdefault(name, {}).setdefault(offsets, _Piece(offsets, sizes, rank))
    return dict(sorted(shapes.items())), {n: sorted(found.values()) for n, found in boxes.items()}


def _gathered(
    snapshot: Snapshot,
    shapes: Mapping[str, tuple[int, ...]],
    pieces: Mapping[str, list[_Piece]],
    team: CheckpointGroup,
) -> Iterator[Tensor]:
    """Whole tensors on rank 0, in the order of ``shapes``; the other ranks send and get nothing."""
    for name, shape in shapes.items():
        local = snapshot.tensors.get(f"{PREFIX}{name}")
        whole = torch.empty(shape) if team.rank == 0 else None
        for piece in pieces.get(name, []):
            if whole is not None:
                part = local if piece.rank == 0 else torch.empty(piece.sizes)
                assert part is not None
                if piece.rank:
                    dist.recv(part, src=piece.rank, group=team.group)
                box = tuple(slice(o, o + s) for o, s in zip(piece.offsets, piece.sizes, strict=True))
                whole[box] = part
            elif piece.rank == team.rank:
                assert local is not None
                dist.send(local.contiguous(), dst=0, group=team.group)
        if whole is not None:
            yield whole


def _header(shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """Header of the safetensors format for fp32 tensors that follow each other in this order."""
    entries: dict[str, Any] = {}
    start = 0
    for name, shape in shapes.items():
        end = start + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
