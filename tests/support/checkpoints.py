"""Small checkpoints that tests share: random weights, as canonical folders and as the release's files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.base import EMA, MODEL, REPA, TensorSpec
from checkpoints_tools.formats import release
from checkpoints_tools.formats.canonical import write_canonical
from checkpoints_tools.infer_config import denoiser_shapes, repa_shapes
from deco_scale.checkpoint.format import CheckpointMeta
from deco_scale.models import ModelConfig
from tests.support.assets import TEXT_DIM, TEXT_TOKENS

META = CheckpointMeta(
    step=7, stage="a", samples=70, seed=0, optimizer_steps=7, data_state={}, parameter_digest="", config={}
)
SMALL = ModelConfig(kind="c2i_baseline", dim=8, num_heads=2, num_blocks=1, patch_size=2, num_classes=3)
TEXT = ModelConfig(
    kind="t2i_deco", dim=16, num_heads=2, num_blocks=1, num_text_blocks=1, patch_size=4, decoder_width=4,
    decoder_blocks=1, text_dim=TEXT_DIM, text_tokens=TEXT_TOKENS,
)  # fmt: skip
CLASSES = ModelConfig(
    kind="c2i_deco", dim=16, num_heads=2, num_blocks=1, patch_size=4, decoder_width=4, decoder_blocks=2,
    num_classes=5,
)  # fmt: skip


def run(*arguments: object) -> int:
    """Exit code of ``deco-ckpt``."""
    return cli.main([str(a) for a in arguments])


def tensors_of(model: ModelConfig, *, seed: int = 0, encoder_dim: int = 5) -> dict[str, Tensor]:
    """Random weights, another EMA, and a REPA head where ``encoder_dim`` is not 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {p + n: s for p in (MODEL, EMA) for n, s in denoiser_shapes(model).items()}
    if encoder_dim:
        shapes |= {REPA + n: s for n, s in repa_shapes(model.dim, encoder_dim).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in sorted(shapes.items())}


def trained_tensors() -> dict[str, Tensor]:
    """Of ``SMALL``, with moments, as training writes them."""
    found = tensors_of(SMALL, encoder_dim=0)
    for kind in ("exp_avg", "exp_avg_sq"):
        found |= {n.replace("model.", f"{kind}.", 1): t * 0.1 for n, t in found.items() if n.startswith("model.")}
    return found


def save(folder: Path, tensors: dict[str, Tensor], *, meta: CheckpointMeta = META, files: int = 1) -> Path:
    """A canonical checkpoint."""
    specs = {n: TensorSpec(tuple(t.shape)) for n, t in tensors.items()}
    write_canonical(folder, specs, lambda n: tensors[n], meta, files=files)
    return folder


def release_file(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def release_state(model: ModelConfig = CLASSES) -> dict[str, Tensor]:
    """The weights, not their EMA, under the release's names."""
    tensors = tensors_of(model, encoder_dim=0)
    ours = {n.removeprefix(MODEL): t for n, t in tensors.items() if n.startswith(MODEL)}
    return {release.DENOISER + n: t.clone() for n, t in release.denoiser_to_release(ours, model).items()}


def assert_same_bits(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def complete(folder: Path, meta: CheckpointMeta = META) -> None:
    """``meta.json`` and ``COMPLETE`` for what lies in the folder."""
    (folder / "meta.json").write_text(json.dumps(dataclasses.asdict(meta), indent=1))
    files = [p for p in folder.iterdir() if p.name != "COMPLETE"]
    sums = {p.name: (p.stat().st_size, google_crc32c.value(p.read_bytes())) for p in files}
    (folder / "COMPLETE").write_text(json.dumps(sums, indent=1))
