"""Weights of the release, or of safetensors files, as a canonical folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, Advance, CheckpointReader, TensorSpec
from checkpoints_tools.formats.canonical import write_canonical
from checkpoints_tools.infer_config import check_fits_fp32
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.config import RunConfig, build_config
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

STAGE = "imported"
_PUBLISHED_TEXT_DIM, _PUBLISHED_ENCODER = 2048, "Qwen/Qwen3-1.7B"


@dataclasses.dataclass(frozen=True, slots=True)
class ImportPlan:
    """What an import will write: tensors by name, the source's name of each, and remarks for the user."""

    specs: dict[str, TensorSpec]
    origin: dict[str, str]
    meta: CheckpointMeta
    remarks: tuple[str, ...]


def plan_import(
    source: CheckpointReader,
    *,
    config: RunConfig | None = None,
    resolution: int | None = None,
    text_encoder: str | None = None,
) -> ImportPlan:
    """Plan an import without reading tensor data.

    If the source has only weights or only an EMA, the other becomes a copy of it, and a remark says so. Moments
    are left out. ``config`` becomes the checkpoint's configuration; without it :func:`bare_config` makes one.
    Raises :class:`ConfigError` for a source that cannot be imported.
    """
    sets = [p for p in (MODEL, EMA) if any(n.startswith(p) for n in source.specs)]
    if not sets:
        raise ConfigError(f"{source.path} has no weights of a denoiser")
    names = {n.removeprefix(sets[0]) for n in source.specs if n.startswith(sets[0])}
    origin = {p + n: (p if p in sets else sets[0]) + n for p in (MODEL, EMA) for n in names}
    missing = sorted(set(origin.values()) - set(source.specs))
    if missing:
        raise ConfigError(f"{source.path} lacks {missing[0]}")
    origin |= {n: n for n in source.specs if n.startswith(REPA)}
    remarks = []
    if len(sets) == 1:
        has, lacks = ("weights", "EMA") if sets[0] == MODEL else ("EMA", "weights")
        remarks.append(f"{source.path} has no {lacks}: a copy of the {has} takes their place")
    moments = [n for n in source.specs if n not in origin]
    if moments:
        remarks.append(f"{len(moments)} tensors of optimizer moments are left out")
    specs = {name: TensorSpec(source.specs[old].shape) for name, old in sorted(origin.items())}
    half = {source.specs[old].dtype for old in origin.values() if source.specs[old].dtype.itemsize < 4}
    if half:
        remarks.append(f"stored in {', '.join(sorted(map(str, half)))}; fp32 here holds the same values")
    check_fits_fp32({old: source.specs[old] for old in origin.values()}, source.path)
    cfg = config or bare_config(source, resolution=resolution, text_encoder=text_encoder)
    meta = CheckpointMeta(
        step=0,
        stage=STAGE,
        samples=0,
        seed=cfg.run.seed,
        optimizer_steps=0,
        data_state={"imported_from": source.path.name, "format": source.format, "facts": _plain(source.facts)},
        parameter_digest="",
        config=json.loads(json.dumps(dataclasses.asdict(cfg))),
    )
    return ImportPlan(specs, origin, meta, tuple(remarks))


def import_checkpoint(
    source: CheckpointReader,
    plan: ImportPlan,
    folder: Path,
    *,
    files: int = 1,
    workers: int = 1,
    advance: Advance = lambda name: None,
) -> CheckpointMeta:
    """Write the planned checkpoint; one tensor per worker is in memory."""

    def read(name: str) -> Tensor:
        return source.read(plan.origin[name])

    return write_canonical(folder, plan.specs, read, plan.meta, files=files, workers=workers, advance=advance)


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
        "stages": [
            {
                "name": STAGE,
                "resolution": resolution or 16 * model.patch_size,
                "steps": 1,
                "global_batch": 1,
                "micro_batch": 1,
                "lr": 0.0,
            }
        ],
        "samples": {"sampler": sampler_of(model)},
    }
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
        "solver": "euler",
        "num_steps": 100,
        "order": 2,
        "guidance": 3.2,
        "guidance_min": 0.1,
        "guidance_max": 1.0,
        "timestep_shift": 1.0,
    }


def _plain(facts: Any) -> dict[str, Any]:
    return {str(k): v for k, v in facts.items() if isinstance(v, int | str) and len(str(v)) < 200}
