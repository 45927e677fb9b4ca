"""Models: published sizes, initial state, shapes of any kind."""

import pytest
import torch

from deco_scale.models import Denoiser, ModelConfig, patchify, unpatchify
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.init_weights import initial_tensors

XXL = ModelConfig(
    kind="t2i_deco",
    dim=1536,
    num_heads=24,
    num_blocks=16,
    num_text_blocks=4,
    decoder_width=32,
    decoder_blocks=3,
    text_dim=2048,
    text_tokens=128,
)
XL = ModelConfig(
    kind="c2i_deco",
    dim=1152,
    num_heads=16,
    num_blocks=28,
    decoder_width=32,
    decoder_blocks=3,
    num_classes=1000,
)
LARGE = ModelConfig(
    kind="c2i_deco",
    dim=1024,
    num_heads=16,
    num_blocks=22,
    decoder_width=32,
    decoder_blocks=3,
    num_classes=1000,
)
BASELINE = ModelConfig(kind="c2i_baseline", dim=1024, num_heads=16, num_blocks=24, num_classes=1000)
TINY = {
    "t2i_deco": ModelConfig(
        kind="t2i_deco", dim=32, num_heads=2, num_blocks=2, num_text_blocks=1, patch_size=4,
        decoder_width=8, decoder_blocks=2, text_dim=12, text_tokens=3,
    ),
    "c2i_deco": ModelConfig(
        kind="c2i_deco", dim=32, num_heads=2, num_blocks=2, patch_size=4, decoder_width=8,
        decoder_blocks=1, num_classes=5,
    ),
    "c2i_baseline": ModelConfig(
        kind="c2i_baseline", dim=32, num_heads=2, num_blocks=2, patch_size=4, num_classes=5
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("cfg", "count"),
    [(XXL, 1_133_759_395), (XL, 682_282_851), (LARGE, 426_938_019), (BASELINE, 459_171_584)],
    ids=["xxl", "xl", "l", "baseline"],
)
def test_published_parameter_counts(cfg: ModelConfig, count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Denoiser(cfg).parameters()) == count


def fresh(cfg: ModelConfig, seed: int = 0) -> Denoiser:
    with torch.device("meta"):
        template = Denoiser(cfg)
    model = Denoiser(cfg)
    model.load_state_dict(dict(initial_tensors(template, seed)), strict=True)
    return model


def condition(cfg: ModelConfig, batch: int) -> torch.Tensor:
    if cfg.kind == "t2i_deco":
        return torch.randn(batch, cfg.text_tokens, cfg.text_dim)
    return torch.arange(batch) % cfg.num_classes


@pytest.mark.parametrize("kind", TINY)
def test_starts_with_zero_output_and_learns(kind: str) -> None:
    cfg = TINY[kind]
    model = fresh(cfg)
    patches = torch.randn(2, 6, cfg.patch_values)
    out = model(patches, torch.rand(2), condition(cfg, 2), grid=(2, 3), hidden_after=1)
    assert out.prediction_BNK.shape == patches.shape
    assert out.hidden_BND is not None and out.hidden_BND.shape == (2, 6, cfg.dim)
    assert torch.all(out.prediction_BNK == 0)
    out.prediction_BNK.sum().backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in model.parameters()) > 0


def test_initial_weights_follow_the_recipe_and_the_seed() -> None:
    cfg = ModelConfig(
        kind="t2i_deco", dim=256, num_heads=4, num_blocks=1, num_text_blocks=0, decoder_width=16,
        decoder_blocks=1, text_dim=8, text_tokens=64,
    )  # fmt: skip
    with torch.device("meta"):
        template = Objective(Denoiser(cfg), ObjectiveConfig(repa_layer=1), encoder_dim=8)
    state = dict(initial_tensors(template, 7))
    assert state.keys() == dict(template.named_parameters()).keys()
    again, other = dict(initial_tensors(template, 7)), dict(initial_tensors(template, 8))
    assert all(torch.equal(state[n], again[n]) for n in state)
    assert not torch.equal(state["denoiser.patch_embed.weight"], other["denoiser.patch_embed.weight"])
    assert state["denoiser.timestep_embed.out.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert state["denoiser.text_embed.position"].std().item() == pytest.approx(1.0, rel=0.05)
    limit = (6 / (cfg.patch_values + cfg.dim)) ** 0.5  # Xavier's uniform bound
    assert state["denoiser.patch_embed.weight"].abs().max().item() == pytest.approx(limit, rel=1e-3)
    for name in ("head.weight", "head.bias", "blocks.0.modulation.1.weight", "cond_proj.bias"):
        assert not state[f"denoiser.decoder.{name}"].any()


@pytest.mark.parametrize("kind", TINY)
def test_decoder_patches_and_images_of_a_batch_are_independent(kind: str) -> None:
    cfg = TINY[kind]
    model = fresh(cfg)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    patches, t, given = torch.randn(2, 4, cfg.patch_values), torch.rand(2), condition(cfg, 2)
    both = model(patches, t, given, grid=(2, 2)).prediction_BNK
    alone = model(patches[1:], t[1:], given[1:], grid=(2, 2)).prediction_BNK
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=1e-5)
    if model.decoder is not None:
        token = torch.randn(2, 4, cfg.dim)
        whole = model.decoder(patches, token)
        part = model.decoder(patches[:, 1:3], token[:, 1:3])
        torch.testing.assert_close(whole[:, 1:3], part, rtol=1e-5, atol=1e-5)


def test_patchify_is_channel_major_and_invertible() -> None:
    image = torch.randn(2, 3, 8, 12)
    patches = patchify(image, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(patches[1, 4].view(3, 4, 4), image[1, :, 4:8, 4:8])
    assert torch.equal(unpatchify(patches, (2, 3), 4), image)


def test_shapes_that_do_not_fit_are_named() -> None:
    model = fresh(TINY["t2i_deco"])
    with pytest.raises(ValueError, match="do not fit the grid"):
        model(torch.randn(1, 5, 48), torch.rand(1), torch.randn(1, 3, 12), grid=(2, 2))
    with pytest.raises(ValueError, match="text has 4 tokens"):
        model(torch.randn(1, 4, 48), torch.rand(1), torch.randn(1, 4, 12), grid=(2, 2))
    with pytest.raises(ValueError, match="num_heads"):
        ModelConfig(kind="c2i_baseline", dim=30, num_heads=4, num_blocks=1, num_classes=2)
