"""Converting other formats to a canonical folder, and canonical weights to the formats of others.

Imported are the release's weights and safetensors; exported are the release's ``.ckpt``, safetensors, and a
diffusers-style folder.
"""

import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.base import (
    EMA,
    MODEL,
    PREFIXES,
    REPA,
    Advance,
    CheckpointReader,
    Plan,
    TensorSpec,
    new_folder,
    read_checked,
    refuse_existing,
    write_errors,
)
from checkpoints_tools.formats import release
from checkpoints_tools.formats.canonical import write_canonical
from checkpoints_tools.formats.tensor_files import (
    CHECKSUMS,
    SETTINGS_CRC,
    as_json,
    settings_crc,
    write_safetensors,
)
from checkpoints_tools.formats.zero.side_file import Progress
from checkpoints_tools.infer_config import check_fits_fp32, release_shapes
from checkpoints_tools.registry import DIFFUSERS_WEIGHTS, PIPELINE, TRANSFORMER
from data_pipeline.storage.files import SAVING, make_durable
from data_pipeline.text import human_bytes
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.checkpoint.integrity import ChecksummedFile, FileChecksums, raw_bytes, write_checksummed
from deco_scale.config import RunConfig, build_config
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

Format = Literal["release", "safetensors", "diffusers"]
Weights = Literal["model", "ema", "both"]
STEM = "model"
STAGE = "imported"
_PUBLISHED_TEXT_DIM, _PUBLISHED_ENCODER = 2048, "Qwen/Qwen3-1.7B"


def plan_import(
    source: CheckpointReader,
    *,
    config: RunConfig | None = None,
    resolution: int | None = None,
    text_encoder: str | None = None,
    files: int = 1,
    workers: int = 1,
) -> Plan:
    """Plan a canonical folder without reading tensor data; writing it has one tensor per worker in memory.

    If the source has only weights or only an EMA, the other becomes a copy of it, and a line says so. Moments
    are left out. ``config`` becomes the checkpoint's configuration; without it :func:`bare_config` makes one.
    Raises :class:`ConfigError` for a source that cannot be imported.
    """
    sets = [p for p in (MODEL, EMA) if any(n.startswith(p) for n in source.specs)]
    if not sets:
        raise ConfigError(f"{source.path} has no weights of a denoiser")
    names = {n.removeprefix(sets[0]) for n in source.specs if n.startswith(sets[0])}
    origin = {p + n: (p if p in sets else sets[0]) + n for p in (MODEL, EMA) for n in names}
    _check_has(source, origin.values())
    origin |= {n: n for n in source.specs if n.startswith(REPA)}
    lines = []
    if len(sets) == 1:
        has, lacks = ("weights", "EMA") if sets[0] == MODEL else ("EMA", "weights")
        lines.append(f"note: {source.path} has no {lacks}: the {has} are copied")
    moments = [n for n in source.specs if n not in origin]
    if moments:
        lines.append(f"note: {len(moments)} tensors of optimizer moments are left out")
    specs = {name: TensorSpec(source.specs[old].shape) for name, old in sorted(origin.items())}
    half = {source.specs[old].dtype for old in origin.values() if source.specs[old].dtype.itemsize < 4}
    if half:
        lines.append(f"note: stored in {', '.join(sorted(map(str, half)))}; fp32 represents the same values")
    check_fits_fp32({old: source.specs[old] for old in origin.values()}, source.path)
    lines.append(f"{source.model.kind}: {_amount(specs)} in fp32")
    cfg = config or bare_config(source, resolution=resolution, text_encoder=text_encoder)
    facts = {str(k): v for k, v in source.facts.items() if isinstance(v, int | str) and len(str(v)) < 200}
    state = {"imported_from": source.path.name, "format": source.format, "facts": facts}
    meta = new_meta(cfg, STAGE, state)

    def read(name: str) -> Tensor:
        return source.read(origin[name])

    run = partial(write_canonical, specs=specs, read=read, meta=meta, files=files, workers=workers)
    return Plan(lines, len(specs), run)


def new_meta(
    cfg: RunConfig, stage: str, data_state: dict[str, Any], progress: Progress = Progress(0, 0, 0)
) -> CheckpointMeta:
    """What ``meta.json`` holds where the source has no configuration of its own."""
    return CheckpointMeta(
        stage=stage, seed=cfg.run.seed, data_state=data_state, parameter_digest="",
        config=json.loads(json.dumps(dataclasses.asdict(cfg))), **dataclasses.asdict(progress),
    )  # fmt: skip


def bare_config(source: CheckpointReader, *, resolution: int | None, text_encoder: str | None) -> RunConfig:
    """A configuration with what sampling an imported model needs.

    Data and training settings are placeholders, as the files do not have them. The sampler is the release's for
    the kind of model, the text encoder the published one if the text has its width.
    """
    model = source.model
    is_text = model.kind == "t2i_deco"
    encoder = _PUBLISHED_ENCODER if model.text_dim == _PUBLISHED_TEXT_DIM else "text_encoder"
    raw: dict[str, Any] = {
        "run": {"dir": f"runs/{STAGE}"},
        "model": dataclasses.asdict(model),
        "data": {"url": "data", "target": "caption" if is_text else "label"},
        "objective": {"repa_weight": 0.0},
        "stages": [{
            "name": STAGE, "resolution": resolution or 16 * model.patch_size, "steps": 1, "global_batch": 1,
            "micro_batch": 1, "lr": 0.0,
        }],
        "samples": {"sampler": sampler_of(model)},
    }  # fmt: skip
    if is_text:
        raw["text_encoder"] = {"path": text_encoder or encoder, "max_tokens": model.text_tokens}
    elif text_encoder is not None:
        raise ConfigError(f"--text-encoder has no meaning for a {model.kind} model")
    return build_config(raw, source=str(source.path))


def sampler_of(model: ModelConfig) -> dict[str, Any]:
    """The release's sampler for a kind of model; guidance of the class models is that for 256 px."""
    if model.kind == "t2i_deco":
        return {"solver": "adams", "num_steps": 25, "order": 2, "guidance": 4.0, "timestep_shift": 3.0}
    return {
        "solver": "euler", "num_steps": 100, "order": 2, "guidance": 3.2, "guidance_min": 0.1, "guidance_max": 1.0,
        "timestep_shift": 1.0,
    }  # fmt: skip


def plan_export(
    source: CheckpointReader,
    *,
    format: Format,
    weights: Weights,
    dtype: torch.dtype,
    max_shard_bytes: int | None = None,
) -> Plan:
    """Plan a new file (``release``) or folder without reading tensor data.

    The release's layout and safetensors carry the REPA head with ``model`` and ``both``; the diffusers-style
    folder is one denoiser. ``<name>.json`` beside a release file, and ``checksums.json`` in a folder, hold size
    and CRC32C of what was written, for ``deco-ckpt verify``. Raises :class:`ConfigError` for sets that the source
    lacks.
    """
    kinds: list[str] = ["model", "ema"] if weights == "both" else [weights]
    for kind in kinds:
        if not any(n.startswith(PREFIXES[kind]) for n in source.specs):
            raise ConfigError(f"{source.path} has no {PREFIXES[kind]}* tensors; choose other --weights")
    if format == "release" and max_shard_bytes is not None:
        raise ConfigError("--max-shard-bytes is for safetensors: the release's .ckpt is one file")
    if format == "diffusers" and weights == "both":
        raise ConfigError("a diffusers-style folder contains one denoiser: --weights ema or model")
    settings = _settings(source, weights, dtype)
    run: Callable[..., None]
    if format == "release":
        if settings["prediction"] != "velocity":
            raise ConfigError(f"{source.path} predicts the image; the release would take it for a velocity")
        tensors = _release_tensors(source, kinds, dtype)
        run = _write_release
    else:
        names = [n for n in source.specs if n.startswith(tuple(PREFIXES[k] for k in kinds))]
        if format == "safetensors" and "model" in kinds:
            names += [n for n in source.specs if n.startswith(REPA)]
        cut = PREFIXES[kinds[0]] if format == "diffusers" else ""
        tensors = {
            n.removeprefix(cut): (TensorSpec(source.specs[n].shape, dtype), partial(source.read, n)) for n in names
        }
        fill = _fill_folder if format == "safetensors" else _fill_pipeline
        run = partial(_write_folder, fill=fill, max_shard_bytes=max_shard_bytes)
    specs = {name: spec for name, (spec, _) in tensors.items()}

    def read(name: str) -> Tensor:
        return tensors[name][1]()

    line = f"{_amount(specs)} in {settings['dtype']}"
    return Plan([line], len(specs), partial(run, specs=specs, read=read, settings=settings))


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
) -> dict[str, tuple[TensorSpec, Callable[[], Tensor]]]:
    """By the release's names: type and shape of each tensor, and how it is made."""
    cfg = source.model
    shapes = release_shapes(cfg)
    tensors: dict[str, tuple[TensorSpec, Callable[[], Tensor]]] = {}
    for kind in kinds:
        theirs = release.DENOISER if kind == "model" else release.EMA
        for rule in release.denoiser_rules(cfg):
            parts = [PREFIXES[kind] + name for name in rule.ours]
            _check_has(source, parts)
            spec = TensorSpec(shapes[rule.release], dtype)
            tensors[theirs + rule.release] = spec, partial(_joined, source, rule, parts)
    if "model" in kinds:
        for name in source.specs:
            if name.startswith(REPA):
                there = release.REPA + name.removeprefix(f"{REPA}layers.")
                tensors[there] = TensorSpec(source.specs[name].shape, dtype), partial(source.read, name)
    return tensors


def _joined(source: CheckpointReader, rule: release.Rule, parts: list[str]) -> Tensor:
    return rule.join([source.read(name) for name in parts], source.model)


def _check_has(source: CheckpointReader, names: Iterable[str]) -> None:
    missing = sorted(set(names) - set(source.specs))
    if missing:
        raise ConfigError(f"{source.path} lacks {missing[0]}")


def _amount(specs: Mapping[str, TensorSpec]) -> str:
    return f"{len(specs):,} tensors, {human_bytes(sum(spec.nbytes for spec in specs.values()))}"


def _write_release(
    target: Path,
    *,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    settings: Mapping[str, Any],
    advance: Advance,
) -> None:
    """One ``torch.save`` archive; its tensors are mapped from a file, so they need not fit into memory."""
    refuse_existing(target)
    if target.suffix != ".ckpt":
        raise ConfigError(f"{target}: the release's files are named *.ckpt")
    with write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=target.parent) as scratch:
            file, beside = Path(scratch) / target.name, Path(scratch) / f"{target.name}.json"
            with ChecksummedFile(file) as out:
                torch.save({"state_dict": _mapped(Path(scratch) / "raw", specs, read, advance)}, out)  # type: ignore[arg-type]
                checksum = out.sync()
            facts = {**settings, "files": {target.name: checksum}, SETTINGS_CRC: settings_crc(settings)}
            write_checksummed(beside, as_json(facts))
            os.rename(beside, target.with_name(beside.name))
            os.rename(file, target)
        make_durable(target.parent)


def _mapped(
    file: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor], advance: Advance
) -> dict[str, Tensor]:
    """Tensors in a new file that is mapped into memory."""
    starts: dict[str, int] = {}
    with file.open("wb") as raw:
        for name, spec in specs.items():
            starts[name] = raw.tell()
            raw.write(raw_bytes(read_checked(read, name, spec)))
            advance(name)
    storage = torch.UntypedStorage.from_file(str(file), False, file.stat().st_size)
    state: dict[str, Tensor] = {}
    for name, spec in specs.items():
        # Each has its own storage, as in a model: torch.save writes full storages.
        part = storage[starts[name] : starts[name] + spec.nbytes]
        state[name] = torch.empty(0, dtype=spec.dtype).set_(part, 0, spec.shape)  # type: ignore[call-overload]
    return state


def _write_folder(
    target: Path, *, fill: Callable[..., FileChecksums], settings: Mapping[str, Any], **tensors: Any
) -> None:
    """A new folder that ``fill`` fills, and the checksums of its files."""
    with new_folder(target) as folder:
        write_checksummed(folder / CHECKSUMS, as_json(fill(folder, dict(settings), **tensors)))


def _fill_folder(folder: Path, settings: dict[str, Any], **tensors: Any) -> FileChecksums:
    checksums = write_safetensors(folder, STEM, **tensors)
    return checksums | {"config.json": write_checksummed(folder / "config.json", as_json(settings))}


def _fill_pipeline(folder: Path, settings: dict[str, Any], **tensors: Any) -> FileChecksums:
    sampler, encoder = settings.pop("sampler"), settings.pop("text_encoder")
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
    for name in (TRANSFORMER, "scheduler"):
        (folder / name).mkdir()
    checksums = {name: write_checksummed(folder / name, as_json(content)) for name, content in files.items()}
    written = write_safetensors(folder / TRANSFORMER, DIFFUSERS_WEIGHTS, **tensors)
    for name in (TRANSFORMER, "scheduler"):
        make_durable(folder / name)
    return checksums | {f"{TRANSFORMER}/{name}": entry for name, entry in written.items()}
