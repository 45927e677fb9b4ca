"""Losses and the time distribution."""

import pytest
import torch
from torch import Tensor

from deco_scale.kernels.select import use_kernels
from deco_scale.models import Denoiser, ModelConfig, patchify, unpatchify
from deco_scale.objectives import Objective, ObjectiveConfig, drop_condition
from deco_scale.objectives.flow_matching import base_time, noised, shift_time, velocity_from_image
from deco_scale.objectives.frequency import (
    block_dct,
    block_transform,
    dct_matrix,
    frequency_loss,
    frequency_weights,
)
from deco_scale.objectives.objective import Tokens
from deco_scale.objectives.repa import repa_loss
from deco_scale.sampling import SamplerConfig, sample


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
    assert dct_matrix(device) is dct_matrix(device) and not weights.is_inference()
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


def test_shifted_times_and_end_points_of_the_path() -> None:
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


def test_velocity_of_an_image_in_float64_and_at_the_clamp() -> None:
    image, noise = torch.randn(2, 6, 3, 4, 4)
    t = torch.tensor([0.0, 0.3, 0.9, 0.949, 0.99, 1.0])
    x_t = noised(image, noise, t)
    found = velocity_from_image(image, x_t, t, 0.05)
    for k, time in enumerate(t.double()):
        wanted = (image[k].double() - x_t[k].double()) / max(1 - time.item(), 0.05)
        torch.testing.assert_close(found[k].double(), wanted, rtol=1e-5, atol=1e-5)
        # Before the clamp it is the flow's velocity; behind it falls to zero.
        share = min(1.0, (1 - time.item()) / 0.05)
        torch.testing.assert_close(found[k], (image[k] - noise[k]) * share, rtol=1e-4, atol=1e-4)
    # Patches and images alike, and half precision is computed in fp32.
    patches = velocity_from_image(patchify(image, 2), patchify(x_t, 2), t, 0.05)
    assert torch.equal(unpatchify(patches, (2, 2), 2), found)
    assert velocity_from_image(image.bfloat16(), x_t, t, 0.05).dtype == torch.float32


class FirstTokens(Tokens):
    """Scores the first two tokens only, as one of several processes."""

    def own(self, x_BND: Tensor) -> Tensor:
        return x_BND[:, :2]

    def share(self, count: int) -> float:
        return 2 / count


def image_objective(patch_size: int = 8, **settings: float) -> Objective:
    torch.manual_seed(0)
    model = ModelConfig(
        kind="c2i_baseline", dim=16, num_heads=2, num_blocks=1, patch_size=patch_size, num_classes=3
    )
    cfg = ObjectiveConfig(prediction="image", repa_weight=0.0, **settings)  # type: ignore[arg-type]
    objective = Objective(Denoiser(model), cfg, encoder_dim=0)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return objective


@pytest.mark.parametrize(
    ("patch_size", "kernels", "sharded"), [(8, "torch", False), (4, "torch", False), (8, "triton", False),
                                           (8, "torch", True), (8, "triton", True)],
)  # fmt: skip
def test_losses_and_gradients_of_a_predicted_image(patch_size: int, kernels: str, sharded: bool) -> None:
    """Against the formula written out in float64: both losses are of velocities with the same clamp."""
    if kernels == "triton":
        pytest.importorskip("triton")
    objective = image_objective(patch_size, freq_weight=0.7, t_eps=0.1)
    use_kernels(objective, kernels)  # type: ignore[arg-type]
    if sharded:
        objective.tokens = FirstTokens()
    image, noise = torch.randn(2, 4, 3, 16, 16)
    t, labels = torch.tensor([0.0, 0.4, 0.85, 0.97]), torch.tensor([0, 1, 2, 3])
    predicted: list[Tensor] = []
    # What a decoder spread over processes does: its own tokens only.
    cut = objective.tokens.own
    objective.denoiser.register_forward_hook(
        lambda m, args, out: (
            predicted.append(cut(out.prediction_BNK)) or out._replace(prediction_BNK=predicted[-1])
        )
    )
    losses = objective(image, noise, t, labels)
    (found,) = torch.autograd.grad(losses["loss"], predicted[0], retain_graph=True)

    output = predicted[0].detach().double().requires_grad_()
    image_BNK, x_t = (cut(patchify(each, patch_size)).double() for each in (image, noised(image, noise, t)))
    remaining = torch.tensor([1.0, 0.6, 0.15, 0.1], dtype=torch.float64)[:, None, None]
    error = (output - x_t) / remaining - (image_BNK - x_t) / remaining
    flow = error.square().mean()
    grid = (1, 2) if sharded else (16 // patch_size, 16 // patch_size)
    weights = frequency_weights(85, gamma=1.0, mode="inv_gamma").double()
    pixels = unpatchify(error, grid, patch_size)
    ycbcr = torch.tensor([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
    blocks = torch.einsum("dc,mcyx->mdyx", ycbcr.double(), pixels).unfold(2, 8, 8).unfold(3, 8, 8)
    matrix = dct_matrix().double()
    freq = (weights[:, None, None] * (matrix @ blocks @ matrix.T).square()).mean()
    share = objective.tokens.share((16 // patch_size) ** 2)
    total = share * (flow + 0.7 * freq)
    (wanted,) = torch.autograd.grad(total, output)
    torch.testing.assert_close(losses["loss"].double(), total.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(losses["loss_flow"].double(), share * flow.detach(), rtol=1e-5, atol=0)
    assert (found.double() - wanted).abs().max() < 1e-5 * wanted.abs().max()
    losses["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters())


def test_losses_of_the_exact_image_are_zero() -> None:
    objective = image_objective()
    image, noise = torch.randn(2, 2, 3, 16, 16)
    objective.denoiser.register_forward_hook(
        lambda m, args, out: out._replace(prediction_BNK=patchify(image, 8) + 0.0 * out.prediction_BNK)
    )
    losses = objective(image, noise, torch.tensor([0.2, 0.999]), torch.tensor([0, 3]))
    assert {name: loss.item() for name, loss in losses.items()} == {
        "loss": 0.0,
        "loss_flow": 0.0,
        "loss_freq": 0.0,
    }


@pytest.mark.parametrize("solver", ["euler", "adams"])
def test_sampling_with_the_exact_image_prediction_returns_the_image(solver: str) -> None:
    """The path is straight, so every solver is exact while no step is shorter than the clamp."""
    image, noise = torch.randn(2, 2, 3, 8, 8)
    cfg = SamplerConfig(solver=solver, num_steps=20, guidance=1.0, timestep_shift=1.0)  # type: ignore[arg-type]
    labels = torch.zeros(2, dtype=torch.long)

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return velocity_from_image(image, x, t, 0.05)

    found = sample(velocity, noise, labels, labels, cfg)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-4)
    # With shorter steps the clamp leaves a rest of the noise, here (1 - 0.01 / 0.05)^5 of what was left at 0.95.
    fine = sample(
        velocity,
        noise,
        labels,
        labels,
        SamplerConfig(solver="euler", num_steps=100, guidance=1.0, timestep_shift=1.0),
    )
    torch.testing.assert_close(fine - image, (noise - image) * 0.05 * 0.8**5, rtol=0, atol=1e-4)


@pytest.mark.parametrize("t_eps", [0.0, -0.1, 1.5])
def test_t_eps_outside_of_its_range_is_refused(t_eps: float) -> None:
    with pytest.raises(ValueError, match=f"t_eps={t_eps} must be above 0"):
        ObjectiveConfig(t_eps=t_eps)
