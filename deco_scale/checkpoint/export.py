"""The EMA of the denoiser as one safetensors file, gathered to rank 0 tensor by tensor."""

import json
import os
import shutil
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.storage.files import atomic_folder, write_durably
from data_pipeline.storage.safetensors import encode_header
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.integrity import raw_bytes
from deco_scale.checkpoint.staging import Snapshot
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.errors import RunError
from deco_scale.parallel.engines.base import EMA_PREFIX

PREFIX = f"ema.{EMA_PREFIX}"
WEIGHTS, SETTINGS = "model.safetensors", "config.json"


Shape = tuple[int, ...]
Layout = dict[str, tuple[Shape, dict[Shape, tuple[Shape, int]]]]
"""By plain name: the tensor's shape, and its pieces by their offsets: sizes, and the rank that sends it."""


def export_ema(snapshot: Snapshot, meta: CheckpointMeta, folder: Path, group: dist.ProcessGroup | None) -> Path:
    """Write ``ema_step_XXXXXXXX/`` in ``folder``: fp32 weights by the plain denoiser's names, and ``config.json``.

    Rank 0 writes and holds one tensor at a time, the others send their parts of it. Raises :class:`RunError` on
    every rank if the disk cannot be written; then nothing is left behind.
    """
    final = folder / f"ema_step_{meta.step:08d}"
    layout = _layout(snapshot, group)
    tensors = _gather_tensors(snapshot, layout, group)

    def write() -> None:
        try:
            if dist.get_rank() == 0:
                _write(tensors, layout, meta, final)
        except OSError as error:
            raise RunError(f"{error.filename or final}: {error.strerror}") from error
        finally:
            # The other ranks send all their parts, also after an error of rank 0.
            for _ in tensors:
                pass

    raise_together(write, group)
    return final


def _write(tensors: Iterator[Tensor], layout: Layout, meta: CheckpointMeta, final: Path) -> None:
    objective = meta.config.get("objective") or {}
    settings = {
        "model": meta.config.get("model"),
        "prediction": objective.get("prediction", "velocity"),
        "t_eps": objective.get("t_eps", 0.05),
        "weights": "ema",
        "dtype": "float32",
        "provenance": {"step": meta.step, "stage": meta.stage, "samples": meta.samples},
    }
    with atomic_folder(final) as temporary:
        with (temporary / WEIGHTS).open("wb") as file:
            file.write(encode_header({name: ("F32", shape) for name, (shape, _) in layout.items()}))
            for tensor in tensors:
                file.write(raw_bytes(tensor))
            file.flush()
            os.fsync(file.fileno())
        write_durably(temporary / SETTINGS, json.dumps(settings, indent=1).encode())
        if final.exists():
            shutil.rmtree(final)


def _layout(snapshot: Snapshot, group: dist.ProcessGroup | None) -> Layout:
    """The pieces that fill each tensor, each from the lowest rank that has it; sorted by name."""
    local = [
        (item.index.fqn.removeprefix(PREFIX), tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        for item in snapshot.plan.items
        if item.index.fqn.startswith(PREFIX) and (data := item.tensor_data) is not None
    ]
    layout: Layout = {}
    for rank, items in enumerate(gather_objects(local, group)):
        for name, shape, offsets, sizes in items:
            _, pieces = layout.setdefault(name, (shape, {}))
            if prod(sizes):
                pieces.setdefault(offsets, (sizes, rank))
    return dict(sorted(layout.items()))


def _gather_tensors(snapshot: Snapshot, layout: Layout, group: dist.ProcessGroup | None) -> Iterator[Tensor]:
    """Full tensors on rank 0, in the order of ``layout``; the other ranks send their parts and yield nothing."""
    rank = dist.get_rank()
    for name, (shape, pieces) in layout.items():
        local = snapshot.tensors.get(f"{PREFIX}{name}")
        full = torch.empty(shape) if rank == 0 else None
        for offsets, (sizes, source) in sorted(pieces.items()):
            if full is not None:
                part = torch.empty(sizes) if source or local is None else local
                if source:
                    dist.recv(part, src=source, group=group)
                full[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = part
            elif source == rank and local is not None:
                dist.send(local.contiguous(), dst=0, group=group)
        if full is not None:
            yield full
