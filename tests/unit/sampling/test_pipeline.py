"""Checkpoints that were imported or exported draw the images of their weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.base import EMA
from deco_scale.cli.main import main as deco
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest
from deco_scale.sampling.generate import EncodeFn
from deco_scale.sampling.images import velocity_of
from deco_scale.sampling.pipeline import DecoPipeline, PipelineError
from tests.support.assets import TEXT_DIM, TEXT_TOKENS
from tests.support.checkpoints import CLASSES, TEXT, release_file, release_state, save, tensors_of


@pytest.mark.slow
def test_an_imported_checkpoint_draws_images(tmp_path: Path, text_encoder: Path) -> None:
    path = release_file(tmp_path / "w.ckpt", {"state_dict": release_state(TEXT)})
    assert cli.main(["import", str(path), str(tmp_path / "step"), "--resolution", "16"]) == 0
    arguments = ["sample", "--checkpoint", str(tmp_path / "step"), "--text-encoder", str(text_encoder)]
    assert deco([*arguments, "--prompt", "a red square", "--num-steps", "2", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "00000_0000.png").is_file()


def _drawn(
    model: ModelConfig,
    tensors: dict[str, Tensor],
    conditions: Sequence[int | str],
    cfg: SamplerConfig,
    encode: EncodeFn | None = None,
) -> Any:
    denoiser = Denoiser(model)
    denoiser.load_state_dict({n.removeprefix(EMA): t for n, t in tensors.items() if n.startswith(EMA)})
    velocity = velocity_of(lambda p, t, c, g: denoiser(p, t, c, grid=g).prediction_BNK, model.patch_size)
    null = encode([""])[0] if encode is not None else torch.tensor(model.num_classes)
    generator = ImageGenerator(velocity, model, encode=encode, null=null, device=torch.device("cpu"))
    requests = [SampleRequest(condition, seed=seed) for condition, seed in zip(conditions, (3, 4), strict=True)]
    return np.stack([pixels for _, pixels in generator.images(requests, size=(8, 8), sampler=cfg, batch=2)])


def test_the_pipeline_draws_classes(tmp_path: Path) -> None:
    tensors = tensors_of(CLASSES)
    source = save(tmp_path / "source", tensors)
    out = tmp_path / "pipe"
    assert cli.main(["export", str(source), str(out), "--format", "diffusers", "--max-shard-bytes", "3000"]) == 0
    kinds = {p.suffix for p in out.rglob("*") if p.is_file()}
    assert kinds == {".json", ".safetensors"}
    pipeline = DecoPipeline.from_pretrained(out)
    assert pipeline.sampler.solver == "euler" and pipeline.sampler.guidance == 3.2
    cfg = SamplerConfig(solver="euler", num_steps=3, guidance=2.0)
    found = pipeline([1, 4], seeds=[3, 4], size=(8, 8), sampler=cfg, batch=2)
    wanted = _drawn(CLASSES, tensors, [1, 4], cfg)
    assert np.array_equal(found, wanted)
    for conditions in (["a cat"], [5], [-1], []):
        with pytest.raises(PipelineError):
            pipeline(conditions)
    with pytest.raises(PipelineError, match="positive multiples of 4"):
        pipeline([1], size=(9, 8))


def test_the_pipeline_draws_prompts(tmp_path: Path, text_encoder: Path) -> None:
    tensors = tensors_of(TEXT)
    source = save(tmp_path / "source", tensors)
    out = tmp_path / "pipe"
    assert cli.main(["export", str(source), str(out), "--format", "diffusers"]) == 0
    generator = torch.Generator().manual_seed(0)
    table = {c: torch.randn(TEXT_TOKENS, TEXT_DIM, generator=generator) for c in ("", "a", "b")}

    def encode(texts: Sequence[str]) -> Tensor:
        return torch.stack([table[text] for text in texts])

    pipeline = DecoPipeline.from_pretrained(out, text_encoder=encode)
    cfg = SamplerConfig(num_steps=3)
    found = pipeline(["a", "b"], seeds=[3, 4], size=(8, 8), sampler=cfg, batch=2)
    wanted = _drawn(TEXT, tensors, ["a", "b"], cfg, encode)
    assert np.array_equal(found, wanted)
    by_path = DecoPipeline.from_pretrained(out, text_encoder=text_encoder, dtype=torch.bfloat16)
    assert by_path(["a red square"], size=(8, 8), sampler=cfg).shape == (1, 8, 8, 3)
    with pytest.raises(PipelineError, match="names no text encoder"):
        DecoPipeline.from_pretrained(out)
    (out / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(PipelineError, match="diffusion_pytorch_model.safetensors is damaged"):
        DecoPipeline.from_pretrained(out, text_encoder=text_encoder)
