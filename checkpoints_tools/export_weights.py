"""Canonical weights as the release's ``.ckpt``, as safetensors, or as a diffusers-style folder."""

import dataclasses
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.base import (
    EMA,
    MODEL,
    REPA,
    Advance,
    CheckpointReader,
    TensorSpec,
    new_folder,
    read_checked,
    refuse_existing,
    write_errors,
)  # fmt: skip
from checkpoints_tools.formats import release
from checkpoints_tools.import_weights import sampler_of
from checkpoints_tools.infer_config import release_shapes
from checkpoints_tools.registry import DIFFUSERS_WEIGHTS, PIPELINE, TRANSFORMER
from checkpoints_tools.safetensors_out import CHECKSUMS, SETTINGS_CRC, as_json, settings_crc, write_safetensors
from data_pipeline.storage.files import SAVING, make_durable
from deco_scale.checkpoint.integrity import ChecksummedFile, FileChecksums, raw_bytes, write_checksummed
from deco_scale.errors import ConfigError

Format = Literal["release", "safetensors", "diffusers"]
Weights = Literal["model", "ema", "both"]
STEM = "model"
_PREFIX = {"model": MODEL, "ema": EMA}


@dataclasses.dataclass(frozen=True, slots=True)
class ExportPlan:
    """Tensors by the target's names, with the type they are written in, and how each is made."""

    format: Format
    specs: dict[str, TensorSpec]
    make: dict[str, Callable[[], Tensor]]
    settings: dict[str, Any]

    def read(self, name: str) -> Tensor:
        return self.make[name]()

    @property
    def nbytes(self) -> int:
        return sum(spec.nbytes for spec in self.specs.values())


def plan_export(source: CheckpointReader, *, format: Format, weights: Weights, dtype: torch.dtype) -> ExportPlan:
    """Plan an export without reading tensor data.

    The release's layout and safetensors carry the REPA head with ``model`` and ``both``; the diffusers-style
    folder is one denoiser. Raises :class:`ConfigError` for sets that the source lacks.
    """
    kinds: list[str] = ["model", "ema"] if weights == "both" else [weights]
    for kind in kinds:
        if not any(n.startswith(_PREFIX[kind]) for n in source.specs):
            raise ConfigError(f"{source.path} has no {_PREFIX[kind]}* tensors; choose other --weights")
    if format == "diffusers" and weights == "both":
        raise ConfigError("a diffusers-style folder holds one denoiser: --weights ema or model")
    settings = _settings(source, weights, dtype)
    if format == "release" and settings["prediction"] != "velocity":
        raise ConfigError(f"{source.path} predicts the image; the release would take it for a velocity")
    if format == "release":
        specs, make = _release_tensors(source, kinds, dtype)
    else:
        names = [n for n in source.specs if n.startswith(tuple(_PREFIX[k] for k in kinds))]
        if format == "safetensors" and "model" in kinds:
            names += [n for n in source.specs if n.startswith(REPA)]
        cut = _PREFIX[kinds[0]] if format == "diffusers" else ""
        specs = {n.removeprefix(cut): TensorSpec(source.specs[n].shape, dtype) for n in names}
        make = {n.removeprefix(cut): partial(source.read, n) for n in names}
    return ExportPlan(format, specs, make, settings)


def export_checkpoint(
    plan: ExportPlan,
    target: Path,
    *,
    max_shard_bytes: int | None = None,
    advance: Advance = lambda name: None,
) -> None:
    """Write a new file (``release``) or folder, under a temporary name first.

    ``<name>.json`` beside a release file, and ``checksums.json`` in a folder, hold size and CRC32C of what was
    written, for ``deco-ckpt verify``. Raises :class:`RunError` if the disk cannot be written; then nothing is left
    behind.
    """
    refuse_existing(target)
    if plan.format == "release" and target.suffix != ".ckpt":
        raise ConfigError(f"{target}: the release's files are named *.ckpt")
    if plan.format == "release":
        with write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=SAVING, dir=target.parent) as scratch:
                _write_release(plan, Path(scratch), target, advance)
            make_durable(target.parent)
    else:
        write = _write_folder if plan.format == "safetensors" else _write_pipeline
        with new_folder(target) as folder:
            checksums = write(plan, folder, max_shard_bytes, advance)
            write_checksummed(folder / CHECKSUMS, as_json(checksums))


def _settings(source: CheckpointReader, weights: Weights, dtype: torch.dtype) -> dict[str, Any]:
    meta = source.meta
    config: Mapping[str, Any] = meta.config if meta is not None else {}
    stages = config.get("stages") or [{}]
    objective = config.get("objective") or {}
    return {
        "model": dataclasses.asdict(source.model),
        "prediction": objective.get("prediction", "velocity"),
        "t_eps": objective.get("t_eps", 0.05),
        "sampler": config.get("samples", {}).get("sampler") or sampler_of(source.model),
        "resolution": stages[-1].get("resolution", 16 * source.model.patch_size),
        "text_encoder": config.get("text_encoder"),
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "provenance": {
            "format": source.format,
            **{name: getattr(meta, name, None) for name in ("step", "stage", "parameter_digest")},
        },
    }


def _release_tensors(
    source: CheckpointReader, kinds: list[str], dtype: torch.dtype
) -> tuple[dict[str, TensorSpec], dict[str, Callable[[], Tensor]]]:
    cfg = source.model
    shapes = release_shapes(cfg)
    specs: dict[str, TensorSpec] = {}
    make: dict[str, Callable[[], Tensor]] = {}
    for kind in kinds:
        theirs = release.DENOISER if kind == "model" else release.EMA
        for rule in release.denoiser_rules(cfg):
            parts = [_PREFIX[kind] + name for name in rule.ours]
            missing = [name for name in parts if name not in source.specs]
            if missing:
                raise ConfigError(f"{source.path} lacks {missing[0]}")
            specs[theirs + rule.release] = TensorSpec(shapes[rule.release], dtype)
            make[theirs + rule.release] = _joined(source, rule, parts)
    if "model" in kinds:
        for name in source.specs:
            if name.startswith(REPA):
                there = release.REPA + name.removeprefix(f"{REPA}layers.")
                specs[there] = TensorSpec(source.specs[name].shape, dtype)
                make[there] = partial(source.read, name)
    return specs, make


def _joined(source: CheckpointReader, rule: release.Rule, parts: list[str]) -> Callable[[], Tensor]:
    return lambda: rule.join(tuple(source.read(name) for name in parts), source.model)


def _write_release(plan: ExportPlan, temporary: Path, target: Path, advance: Advance) -> None:
    """One ``torch.save`` archive; its tensors are mapped from a file, so they need not fit into memory."""
    scratch = temporary / "scratch"
    starts: dict[str, int] = {}
    with scratch.open("wb") as raw:
        for name, spec in plan.specs.items():
            starts[name] = raw.tell()
            raw.write(raw_bytes(read_checked(plan.read, name, spec)))
            advance(name)
    storage = torch.UntypedStorage.from_file(str(scratch), False, scratch.stat().st_size)
    state: dict[str, Tensor] = {}
    for name, spec in plan.specs.items():
        # Each has its own storage, as in a model: torch.save writes full storages.
        part = storage[starts[name] : starts[name] + spec.nbytes]
        state[name] = torch.empty(0, dtype=spec.dtype).set_(part, 0, spec.shape)  # type: ignore[call-overload]
    file = temporary / target.name
    with ChecksummedFile(file) as out:
        torch.save({"state_dict": state}, out)  # type: ignore[arg-type]
        checksum = out.sync()
    beside = target.with_name(f"{target.name}.json")
    facts = {**plan.settings, "files": {target.name: checksum}, SETTINGS_CRC: settings_crc(plan.settings)}
    write_checksummed(temporary / beside.name, as_json(facts))
    os.rename(temporary / beside.name, beside)
    os.rename(file, target)


def _write_folder(plan: ExportPlan, folder: Path, limit: int | None, advance: Advance) -> FileChecksums:
    checksums = write_safetensors(folder, STEM, plan.specs, plan.read, max_shard_bytes=limit, advance=advance)
    checksums["config.json"] = write_checksummed(folder / "config.json", as_json(plan.settings))
    return checksums


def _write_pipeline(plan: ExportPlan, folder: Path, limit: int | None, advance: Advance) -> FileChecksums:
    settings = dict(plan.settings)
    sampler, encoder = settings.pop("sampler"), settings.pop("text_encoder")
    (folder / TRANSFORMER).mkdir()
    (folder / "scheduler").mkdir()
    files = {
        PIPELINE: {
            "_class_name": "DecoPipeline",
            TRANSFORMER: ["deco_scale.models", "Denoiser"],
            "scheduler": ["deco_scale.sampling", "SamplerConfig"],
            "text_encoder": encoder,
            "resolution": settings.pop("resolution"),
        },
        f"{TRANSFORMER}/config.json": {"_class_name": "Denoiser", **settings},
        "scheduler/scheduler_config.json": {"_class_name": "SamplerConfig", **sampler},
    }
    checksums = {name: write_checksummed(folder / name, as_json(content)) for name, content in files.items()}
    written = write_safetensors(
        folder / TRANSFORMER, DIFFUSERS_WEIGHTS, plan.specs, plan.read, max_shard_bytes=limit, advance=advance
    )
    for name in (TRANSFORMER, "scheduler"):
        make_durable(folder / name)
    return checksums | {f"{TRANSFORMER}/{name}": entry for name, entry in written.items()}
