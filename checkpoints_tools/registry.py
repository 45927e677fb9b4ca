"""Opening any checkpoint: the format is recognised by the content, not by an option.

A format is a subclass of :class:`checkpoints_tools.base.CheckpointReader`: tensors with canonical names, read one
at a time (or a range of rows of one). ``inspect``, ``diff``, ``import``, ``export`` and ``average`` use only its
members, so a new format needs a reader and a line in :func:`open_checkpoint`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.base import PREFIXES, SETS, CheckpointReader
from checkpoints_tools.formats.canonical import CanonicalReader
from checkpoints_tools.formats.tensor_files import INDEX_SUFFIX, LightningStore, open_safetensors, read_json
from checkpoints_tools.formats.universal import UniversalReader, is_universal
from checkpoints_tools.formats.weight_files import BareReader, ReleaseReader
from checkpoints_tools.formats.zero.reader import ZeroReader, is_zero
from checkpoints_tools.infer_config import infer_complete_model
from deco_scale.checkpoint.format import COMPLETE, METADATA, find_checkpoint
from deco_scale.errors import ConfigError

PIPELINE = "model_index.json"
TRANSFORMER = "transformer"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model"
_BARE = "patch_embed.weight"
"""A denoiser's own name of a tensor, as in the EMA exports of a run."""
_ZIP_MAGIC, _SAFETENSORS_BRACE = b"PK\x03\x04", b"{"


def open_checkpoint(path: Path, *, stated: Mapping[str, Any] | None = None) -> CheckpointReader:
    """Open a canonical, diffusers-style or DeepSpeed folder, a ``.ckpt``, or safetensors (file, index or folder).

    Of a run's folder the newest complete checkpoint is opened. ``stated`` are model settings that the tensors must
    not contradict. Raises :class:`ConfigError` naming the path and why it cannot be opened.
    """
    if path.is_dir():
        return _open_folder(path, stated)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file or folder")
    if path.name.endswith(INDEX_SUFFIX):
        return _open_safetensors(path, stated)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    if head[:4] == _ZIP_MAGIC:
        return ReleaseReader(LightningStore(path), kind=".ckpt", stated=stated)
    if head[8:] == _SAFETENSORS_BRACE:
        return _open_safetensors(path, stated)
    raise ConfigError(
        f"{path} is neither an archive of torch.save (a .ckpt) nor a safetensors file; "
        "plain pickles are not read, because they can run code"
    )


def _open_folder(path: Path, stated: Mapping[str, Any] | None) -> CheckpointReader:
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        return CanonicalReader(checkpoint)
    if (path / METADATA).is_file():
        raise ConfigError(f"{path} is not a complete checkpoint (no {COMPLETE} file): its saving was interrupted")
    if (path / PIPELINE).is_file():
        return _open_pipeline(path, stated)
    if is_zero(path):
        return ZeroReader(path)
    if is_universal(path):
        return UniversalReader(path)
    indexes = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    files = indexes or sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return _open_safetensors(files[0], stated)
    if files:
        raise ConfigError(f"{path} has {len(files)} safetensors files; name the one that is meant")
    raise ConfigError(
        f"{path} has no checkpoint of a known format (canonical, safetensors, diffusers-style, DeepSpeed)"
    )


def _open_safetensors(path: Path, stated: Mapping[str, Any] | None) -> CheckpointReader:
    store = open_safetensors(path)
    first = next(iter(sorted(store.specs)), "")
    if first.startswith(tuple(f"{kind}." for kind in SETS)):
        return BareReader(store, kind="safetensors", stated=stated)
    if _BARE in store.specs:
        beside = path.parent / "config.json"
        weights = read_json(beside).get("weights") if beside.is_file() else "model"
        if weights not in ("model", "ema"):
            raise ConfigError(f"{beside} must have weights: model or ema for the denoiser in {path}")
        return BareReader(store, kind="safetensors of a bare denoiser", prefix=PREFIXES[weights], stated=stated)
    return ReleaseReader(store, kind="safetensors", stated=stated)


def _open_pipeline(path: Path, stated: Mapping[str, Any] | None) -> CheckpointReader:
    settings = read_json(path / TRANSFORMER / "config.json")
    weights, model = settings.get("weights"), settings.get("model")
    if weights not in ("model", "ema") or not isinstance(model, dict):
        raise ConfigError(f"{path / TRANSFORMER / 'config.json'} was not written by deco-ckpt export")
    single = path / TRANSFORMER / f"{DIFFUSERS_WEIGHTS}.safetensors"
    index = path / TRANSFORMER / f"{DIFFUSERS_WEIGHTS}{INDEX_SUFFIX}"
    store = open_safetensors(index if index.is_file() else single)
    source = BareReader(store, kind="diffusers-style folder", prefix=PREFIXES[weights], stated=model)
    if stated is not None:
        infer_complete_model(source.specs, stated, where=str(path))
    source.path = path
    return source
