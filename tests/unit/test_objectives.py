"""Losses and the law of times."""

import pytest
import torch

from deco_scale.models import Denoiser, ModelConfig, patchify
from deco_scale.objectives import Objective, ObjectiveConfig, drop_condition
from deco_scale.objectives.flow import base_time, noised, shift_time
from deco_scale.objectives.frequency import (
    block_dct,
    block_transform,
    dct_matrix,
    frequency_loss,
    frequency_weights,
)
from deco_scale.objectives.repa import repa_loss


def test_dct_is_orthonormal_and_keeps_energy() -> None:
    matrix = dct_matrix()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8), rtol=0, atol=1e-6)
    image = torch.randn(2, 3, 16, 24)
    coefficients = block_dct(image)
    assert coefficients.shape == (2, 3, 2, 3, 8, 8)
    torch.testing.assert_close(coefficients.square().sum(), image.square().sum())
    flat = block_dct(torch.ones(1, 1, 8, 8))[0, 0, 0, 0]
    torch.testing.assert_close(flat, torch.nn.functional.pad(torch.tensor([[8.0]]), (0, 7, 0, 7)))


def test_constants_are_made_once_and_are_ordinary_tensors() -> None:
    """A step must not copy to the device; and a first use in inference mode must not spoil training."""
    device = torch.device("cpu")
    with torch.inference_mode():
        weights = frequency_weights(77, gamma=0.9, mode="inv", device=device)
    assert weights is frequency_weights(77, gamma=0.9, mode="inv", device=device)
    assert dct_matrix(device) is dct_matrix() and not weights.is_inference()
    error = torch.randn(1, 3, 8, 8, requires_grad=True)
    frequency_loss(error, weights).backward()
    assert error.grad is not None
    pixels = torch.randn(8, 8)
    coefficients = (block_transform(device) @ pixels.flatten()).unflatten(0, (8, 8))
    torch.testing.assert_close(coefficients, dct_matrix() @ pixels @ dct_matrix().T, rtol=0, atol=2e-6)


@pytest.mark.parametrize("quality", [1, 30, 49, 50, 85, 100])
@pytest.mark.parametrize("mode", ["inv_gamma", "inv"])
def test_weights_have_mean_one_and_prefer_low_frequencies(quality: int, mode: str) -> None:
    weights = frequency_weights(quality, gamma=1.0, mode=mode)  # type: ignore[arg-type]
    torch.testing.assert_close(weights.mean(dim=(1, 2)), torch.ones(3))
    assert weights[0, 0, 0] >= weights[0, 7, 7]
    assert torch.equal(weights[1], weights[2])


def test_loss_of_patches_is_the_loss_of_the_image() -> None:
    error, weights = torch.randn(2, 3, 32, 32), frequency_weights(85, gamma=1.0, mode="inv_gamma")
    patches = patchify(error, 16).flatten(0, 1).unflatten(-1, (3, 16, 16))
    torch.testing.assert_close(frequency_loss(error, weights), frequency_loss(patches, weights))


@pytest.mark.parametrize("patch_size", [4, 8])
def test_objective_is_the_weighted_sum_for_any_patch_size(patch_size: int) -> None:
    model = Denoiser(
        ModelConfig(kind="c2i_baseline", dim=16, num_heads=2, num_blocks=1, patch_size=patch_size, num_classes=3)
    )
    assert model.final is not None
    model.final.reset_parameters()
    cfg = ObjectiveConfig(freq_weight=0.7, repa_weight=0.3, repa_layer=1)
    objective = Objective(model, cfg, encoder_dim=5)
    image, noise = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16)
    features = torch.randn(2, (16 // patch_size) ** 2, 5)
    losses = objective(image, noise, torch.rand(2), torch.tensor([0, 3]), features)
    total = losses["loss_flow"] + 0.7 * losses["loss_freq"] + 0.3 * losses["loss_repa"]
    torch.testing.assert_close(losses["loss"], total)
    # The model starts at zero output, so the error is the target itself.
    torch.testing.assert_close(losses["loss_flow"], (image - noise).square().mean())
    weights = frequency_weights(85, gamma=1.0, mode="inv_gamma")
    torch.testing.assert_close(losses["loss_freq"], frequency_loss(image - noise, weights))
    with pytest.raises(ValueError, match="no encoder features"):
        objective(image, noise, torch.rand(2), torch.tensor([0, 3]))


def test_repa_is_zero_for_parallel_tokens_and_refuses_another_grid() -> None:
    tokens = torch.randn(2, 4, 8)
    assert repa_loss(tokens, 3 * tokens).item() == pytest.approx(0.0, abs=1e-6)
    assert repa_loss(tokens, -tokens).item() == pytest.approx(2.0, abs=1e-6)
    with pytest.raises(ValueError, match="one of its patches per model patch"):
        repa_loss(tokens, tokens[:, :3])


def test_times_and_path() -> None:
    t = base_time(torch.tensor([-30.0, 0.0, 30.0]), "logit_normal")
    torch.testing.assert_close(t, torch.tensor([0.0, 0.5, 1.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(shift_time(t, 3.0), torch.tensor([0.0, 0.25, 1.0]), atol=1e-6, rtol=0)
    image, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    x = noised(image, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(x[0], noise[0]) and torch.equal(x[1], image[1])


def test_dropped_conditions_become_the_null_condition() -> None:
    dropped = torch.tensor([True, False])
    text, null = torch.randn(2, 3, 4), torch.randn(3, 4)
    out = drop_condition(text, null, dropped)
    assert torch.equal(out[0], null) and torch.equal(out[1], text[1])
    labels = drop_condition(torch.tensor([1, 2]), torch.tensor(9), dropped)
    assert labels.tolist() == [9, 2]
