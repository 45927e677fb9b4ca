"""Sampling and the frozen encoders at their real sizes on a GPU that is not there; see test_fake_cuda.py."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deco_scale.cli.model_loading import _predictor
from deco_scale.kernels.select import Kernels
from deco_scale.models import ModelConfig
from deco_scale.models.encoders import ImageEncoder, TextEncoder
from deco_scale.sampling import ImageGenerator, SamplerConfig, SampleRequest
from deco_scale.sampling.config import Solver
from deco_scale.sampling.images import velocity_of
from tests.support.device_check import DeviceCheck
from tests.support.fake_cuda import fake_cuda
from tests.support.plain_engine import make_objective, put_on
from tests.unit.fake_cuda.test_step import (
    BF16,
    CONFIG,
    ENCODER_DIM,
    FP32,
    KERNELS,
    PRODUCTS,
    custom,
    expected_custom,
)

SAMPLER = {
    "sampling/samplers.py:time_grid": ("compute",),
    "objectives/flow_matching.py:shift_time": ("compute",),
    "sampling/samplers.py:adams_weights": ("compute",),
    "sampling/guidance.py:guidance_at": ("compute",),
    "sampling/samplers.py:integrate": ("compute", "send_pageable"),
    "sampling/samplers.py:integrate.<locals>.guided": ("compute",),
    "sampling/images.py:seeded_noise": ("compute",),
    "sampling/images.py:seeded_noise.<locals>.<listcomp>": ("compute",),
    "sampling/generate.py:ImageGenerator.images.<locals>.generate": ("send_pageable",),
    "sampling/images.py:to_uint8": ("read", "compute"),
}
"""Of a call, not of its steps: times and noise are the host's, and the finished images go there."""


@pytest.mark.parametrize("kernels", KERNELS)
def test_sampling_stays_on_the_device(kernels: Kernels) -> None:
    """The solver of the samples of a run with the whole model; the other solvers with a short one."""
    short = dataclasses.replace(CONFIG.model, num_blocks=1, num_text_blocks=1)
    cases: list[tuple[Solver, ModelConfig]] = [("adams", CONFIG.model), ("heun", short), ("euler", short)]
    jobs = [
        SampleRequest("a photo of a bench", seed=0),
        SampleRequest("a bowl of ramen", seed=1, negative="blurry"),
    ]
    shape = (CONFIG.model.text_tokens, CONFIG.model.text_dim)
    for solver, model in cases:
        cfg = dataclasses.replace(
            CONFIG, model=model, objective=dataclasses.replace(CONFIG.objective, repa_weight=0.0)
        )
        settings = SamplerConfig(
            solver=solver, num_steps=3, order=2, guidance=4.0, guidance_min=0.2, guidance_rescale=0.7
        )
        with fake_cuda():
            device = torch.device("cuda")
            denoiser = make_objective(cfg, device, kernels=kernels).denoiser.eval().requires_grad_(False)
            predict, _ = _predictor(denoiser, cfg.precision, device, compile=False, tp=None)
            generator = ImageGenerator(
                velocity_of(predict, model.patch_size),
                model,
                encode=lambda texts: torch.empty(len(texts), *shape, device="cuda"),
                null=torch.empty(shape, device=device),
                device=device,
            )
            with DeviceCheck("cuda", allowed=SAMPLER) as check:
                images = [image for _, image in generator.images(jobs, size=(512, 512), sampler=settings, batch=2)]
        assert [image.shape for image in images] == [(512, 512, 3)] * 2 and images[0].dtype == np.uint8
        renders = [c for c in check.calls if c.place.key == "models/pixel_decoder.py:PixelDecoder.forward"]
        # Three steps, and the second half of two of Heun's; without guidance the batch is not doubled.
        sizes = [c.inputs[1].shape[0] for c in renders if c.name == "aten::addmm"]
        assert len(sizes) == (5 if solver == "heun" else 3) and len(set(sizes)) == 2
        for call in check.calls:
            if call.place.file.startswith("sampling/"):
                assert {x.dtype for x in call.outputs} <= {FP32, torch.uint8, torch.bool}, f"not in fp32: {call}"
            assert call.name not in PRODUCTS or call.floats == {BF16}, f"not in bf16: {call}"
        once = expected_custom(model, kernels, backward=False)
        once.pop("squared_error_sums", None)
        assert custom(check.calls) == {name: count * len(sizes) for name, count in once.items()}


class Tokens:
    """In place of a tokenizer: tensors of the host, made before the run, for so many texts as are expected."""

    def __init__(self, counts: Sequence[int]) -> None:
        sizes = {count: (count, CONFIG.model.text_tokens) for count in counts}
        names = ("input_ids", "attention_mask")
        self._made = {n: {name: torch.zeros(sizes[n], dtype=torch.int64) for name in names} for n in sizes}

    def __call__(self, texts: Sequence[str], *, max_length: int, **options: Any) -> dict[str, Tensor]:
        assert max_length == CONFIG.model.text_tokens and options["return_tensors"] == "pt"
        return self._made[len(texts)]


ENCODERS = {
    "models/encoders.py:TextEncoder._to_device": ("compute", "send"),
}
"""Tokens are made on the host. Nothing is read back, also not whether any token is padding."""
NO_MASK = ENCODERS | {"models/encoders.py:TextEncoder._states": ("compute", "read")}
"""The longest text is found among the host's tokens."""


@pytest.mark.slow
def test_frozen_encoders_stay_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Dinov2Config, Dinov2Model, Qwen3Config, Qwen3Model, masking_utils

    # It would spare fake tensors what it asks of real ones.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: False)
    qwen3 = Qwen3Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )
    dinov2 = Dinov2Config(
        hidden_size=ENCODER_DIM, num_hidden_layers=12, num_attention_heads=12, image_size=518, patch_size=14
    )
    # The empty caption is encoded first.
    tokens = Tokens([1, *(stage.micro_batch for stage in CONFIG.stages)])
    with torch.device("meta"):
        text, images = Qwen3Model._from_config(qwen3, dtype=BF16), Dinov2Model._from_config(dinov2, dtype=BF16)
    with fake_cuda():
        device = torch.device("cuda")
        text, images = put_on(text, device), put_on(images, device)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (text, images)]
        assert sizes == [1_720_574_976, 86_580_480]
        image_encoder = ImageEncoder(images, device)
        with DeviceCheck("cuda", allowed=ENCODERS) as check:
            text_encoder = TextEncoder(text, tokens, CONFIG.text_encoder, device)
            for stage in CONFIG.stages:
                states = text_encoder.encode(["a photo of a bench"] * stage.micro_batch)
                assert states.shape == (stage.micro_batch, CONFIG.model.text_tokens, CONFIG.model.text_dim)
                image = torch.empty(stage.micro_batch, 3, stage.resolution, stage.resolution, device=device)
                features = image_encoder.encode(image)
                patches = (stage.resolution // CONFIG.model.patch_size) ** 2
                assert features.shape == (stage.micro_batch, patches, ENCODER_DIM)
                assert states.dtype == FP32 and features.dtype == BF16
    for call in check.calls:
        # The angles of Qwen3's rotary position are a product in fp32.
        angles = call.name == "aten::bmm" and 1 in call.inputs[1].shape[1:]
        wanted = FP32 if angles else BF16
        assert call.name not in PRODUCTS or call.floats == {wanted}, f"not in {wanted}: {call}"


def test_text_without_a_mask_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import Qwen3Config, Qwen3Model, masking_utils

    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: False)
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen3Config(**sizes, intermediate_size=48, num_key_value_heads=1, head_dim=16)
    assert CONFIG.text_encoder is not None
    settings = dataclasses.replace(CONFIG.text_encoder, zero_padding=True)
    tokens = Tokens([1, 4])
    with torch.device("meta"):
        text = Qwen3Model._from_config(config, dtype=BF16)
    with fake_cuda():
        device = torch.device("cuda")
        with DeviceCheck("cuda", allowed=NO_MASK) as check:
            encoder = TextEncoder(put_on(text, device), tokens, settings, device)
            assert encoder.encode(["a photo of a bench"] * 4).shape == (4, CONFIG.model.text_tokens, 32)
    attention = [call for call in check.calls if "scaled_dot_product" in call.name]
    assert len(attention) == 4 and {call.inputs[0].shape[2] for call in attention} == {32}
