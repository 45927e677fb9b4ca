"""Triton kernel of the flow and frequency losses against the formulas in float64, by the interpreter."""

import pytest
import torch
from torch import Tensor

from deco_scale.kernels.select import use_kernels
from deco_scale.models import Denoiser, ModelConfig, patchify
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.frequency import (
    block_transform,
    colour_matrix,
    dct_matrix,
    frequency_weights,
)

pytest.importorskip("triton")

from deco_scale.kernels.triton.losses import flow_and_frequency

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sums of products with 64 terms in fp32; a GPU takes them as three products of TF32 parts.
FP32 = 1e-6 if DEVICE.type == "cpu" else 5e-6


def tables() -> tuple[Tensor, Tensor, Tensor]:
    weights = frequency_weights(60, gamma=0.8, mode="inv_gamma", device=DEVICE)
    return block_transform(DEVICE), colour_matrix(DEVICE), weights


def formula(prediction: Tensor, target: Tensor, patch_size: int) -> tuple[Tensor, Tensor]:
    """Both losses in float64, block by block."""
    error = (prediction.double() - target.double()).reshape(-1, 3, patch_size, patch_size)
    ycbcr = torch.einsum("dc,mcyx->mdyx", colour_matrix(DEVICE).double(), error)
    blocks = ycbcr.unfold(2, 8, 8).unfold(3, 8, 8)
    dct, weights = dct_matrix(DEVICE).double(), tables()[2].double()
    coefficients = torch.einsum("uy,mdijyx,vx->mdijuv", dct, blocks, dct)
    return error.square().mean(), (weights[:, None, None] * coefficients.square()).mean()


@pytest.mark.parametrize(("patch_size", "count"), [(8, 5), (16, 9), (24, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_losses_and_gradient_equal_the_formulas(patch_size: int, count: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # Not contiguous: the target is often a slice of tokens.
    prediction = torch.randn(2, count, 3 * patch_size**2, device=DEVICE).to(dtype).requires_grad_()
    target = torch.randn(2, count + 1, 3 * patch_size**2, device=DEVICE)[:, 1:]
    results = []
    for flow, frequency in (
        flow_and_frequency(prediction, target, *tables(), patch_size),
        formula(prediction, target, patch_size),
    ):
        (grad,) = torch.autograd.grad(0.7 * flow + 1.3 * frequency, prediction)
        results.append((flow, frequency, grad))
    (flow, frequency, grad), (wanted_flow, wanted_frequency, wanted_grad) = results
    torch.testing.assert_close(flow.double(), wanted_flow, rtol=FP32, atol=0)
    torch.testing.assert_close(frequency.double(), wanted_frequency, rtol=FP32, atol=0)
    assert grad.dtype == dtype
    # Both end in one rounding to fp16, which may tip the other way.
    tolerance = FP32 if dtype == torch.float32 else 2**-10
    assert (grad.double() - wanted_grad.double()).abs().max() < tolerance * wanted_grad.double().abs().max()


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    x = torch.randn(2, 3, 192, device=DEVICE)
    with pytest.raises(ValueError, match="must have one shape"):
        flow_and_frequency(x, x[:, :2], *tables(), 8)
    with pytest.raises(ValueError, match="a multiple of 8"):
        flow_and_frequency(x[..., :48], x[..., :48], *tables(), 4)
    with pytest.raises(ValueError, match="weights must have 192 values"):
        flow_and_frequency(x, x, *tables()[:2], torch.ones(64, device=DEVICE), 8)
    with pytest.raises(ValueError, match="float64"):
        flow_and_frequency(x.double(), x.double(), *tables(), 8)


@pytest.mark.slow
def test_operator_passes_opcheck() -> None:
    x = torch.randn(2, 3, 192, device=DEVICE, requires_grad=True)
    args = (x, torch.randn(2, 3, 192, device=DEVICE), *tables(), 8)
    torch.library.opcheck(torch.ops.deco_scale.squared_error_sums.default, args)


@pytest.mark.slow
@pytest.mark.parametrize("patch_size", [4, 8])
def test_objective_is_the_same_with_triton_and_torch(patch_size: int) -> None:
    """Patches of 4 pixels hold no whole block: they take the torch formulas, whatever is chosen."""
    torch.manual_seed(0)
    model = Denoiser(
        ModelConfig(kind="c2i_baseline", dim=16, num_heads=2, num_blocks=1, patch_size=patch_size, num_classes=3)
    )
    cfg = ObjectiveConfig(freq_weight=0.7, repa_weight=0.0)
    objective = Objective(model, cfg, encoder_dim=5).to(DEVICE)
    for parameter in objective.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image, noise = torch.randn(2, 2, 3, 16, 24, device=DEVICE)
    t, labels = torch.rand(2, device=DEVICE), torch.tensor([0, 3], device=DEVICE)
    results = []
    for kernels in ("torch", "triton"):
        use_kernels(objective, kernels)  # type: ignore[arg-type]
        objective.zero_grad()
        losses = objective(image, noise, t, labels)
        losses["loss"].backward()
        grads = {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}
        results.append((losses, grads))
    (losses, grads), (found_losses, found_grads) = results
    assert set(losses) == set(found_losses) == {"loss", "loss_flow", "loss_freq"} and grads
    for name in losses:
        torch.testing.assert_close(found_losses[name], losses[name], rtol=2e-6, atol=0)
    for name, grad in grads.items():
        # Both in fp32, through all layers: relative to the largest entry.
        assert (found_grads[name] - grad).abs().max() < 2e-5 * grad.abs().max(), name


def test_a_process_without_tokens_gets_no_gradient() -> None:
    x = torch.zeros(2, 0, 192, device=DEVICE, requires_grad=True)
    flow, frequency = flow_and_frequency(x, x.detach(), *tables(), 8)
    # The mean of nothing, as the torch formulas have it; the objective turns it into zero.
    assert flow.isnan() and frequency.isnan()


def test_patches_of_an_image_cover_its_blocks() -> None:
    image, noise = torch.randn(2, 1, 3, 32, 16, device=DEVICE)
    patches = [patchify(x, 16) for x in (image, noise)]
    frequency = flow_and_frequency(*patches, *tables(), 16)[1]  # type: ignore[call-arg]
    blocks = [patchify(x, 8) for x in (image, noise)]
    torch.testing.assert_close(frequency, flow_and_frequency(*blocks, *tables(), 8)[1])  # type: ignore[call-arg]
