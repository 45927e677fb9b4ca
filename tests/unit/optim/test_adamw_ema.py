"""AdamW with EMA: clipping, the gate for non-finite updates, and steps by groups."""

import pytest
import torch

from deco_scale.kernels.select import Kernels
from deco_scale.optim.adamw_ema import AdamWWithEMA, nan_if_nonfinite
from deco_scale.optim.config import OptimizerConfig


def test_a_nonfinite_loss_makes_every_gradient_nan() -> None:
    weight = torch.ones(3, requires_grad=True)
    nan_if_nonfinite((weight * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
    assert weight.grad is not None and weight.grad.tolist() == [1, 2, 3]
    weight.grad = None
    # Infinite in value, but with a finite gradient.
    nan_if_nonfinite(weight.sum() + torch.tensor(float("inf"))).backward()
    assert weight.grad is not None and bool(torch.isnan(weight.grad).all())  # type: ignore[unreachable]


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_update_is_adamw_with_clipping_and_a_skipped_one_changes_nothing(kernels: Kernels) -> None:
    torch.manual_seed(0)
    start = torch.randn(5)
    ours, theirs = start.clone(), torch.nn.Parameter(start.clone())
    shards = {"w": ours, "empty": torch.zeros(0), "head": torch.ones(2)}
    cfg = OptimizerConfig(clip_norm=0.5, ema_decay=0.9, weight_decay=0.1)
    optimizer = AdamWWithEMA(shards.values(), cfg, kernels=kernels)
    optimizer.track(shards, ema={"w", "empty"})
    assert (
        optimizer.tensors("ema").keys() == {"w", "empty"} and optimizer.tensors("exp_avg").keys() == shards.keys()
    )
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    average = start.clone()

    def update(grad: torch.Tensor) -> torch.Tensor:
        ours.grad, shards["empty"].grad = grad.clone(), torch.zeros(0)
        optimizer.begin(lr=1e-2, betas=(0.9, 0.95), norm=grad.norm())
        optimizer.step()
        assert optimizer.skipped is not None
        optimizer.end(optimizer.skipped)
        return optimizer.skipped

    for step in range(6):
        grad = torch.randn(5) * (0.01 if step % 2 else 10)
        if step == 3:
            before = [t.clone() for t in (ours, optimizer.tensors("ema")["w"])]
            assert update(torch.full((5,), float("nan"))).item() == 1.0 and optimizer.steps == 3
            assert torch.equal(before[0], ours)
            assert torch.equal(before[1], optimizer.tensors("ema")["w"])
        theirs.grad = grad.clone()
        torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
        average.lerp_(theirs.detach(), 0.1)
        assert update(grad).item() == 0.0
    assert shards["head"].tolist() == [1.0, 1.0]
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.tensors("ema")["w"], average, rtol=1e-6, atol=1e-7)
    held = ours.clone()
    with optimizer.swap_ema():
        torch.testing.assert_close(ours, average, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours, held)


def test_steps_group_by_group_count_as_one_update() -> None:
    torch.manual_seed(1)
    together, apart = torch.randn(2, 7), torch.randn(2, 7)
    apart.copy_(together)
    cfg = OptimizerConfig(weight_decay=0.1)
    whole, grouped = (AdamWWithEMA(list(t), cfg, kernels="torch") for t in (together, apart))
    for optimizer in (whole, grouped):
        parameters = optimizer.param_groups[0]["params"]
        optimizer.track({str(i): p for i, p in enumerate(parameters)}, ema={"0", "1"})
    parameters = grouped.param_groups[0]["params"]
    for _ in range(3):
        grads = torch.randn(2, 7)
        for optimizer in (whole, grouped):
            for grad, parameter in zip(grads, optimizer.param_groups[0]["params"], strict=True):
                parameter.grad = grad.clone()
            optimizer.begin(lr=1e-2, betas=(0.9, 0.95))
        whole.step()
        for parameter in parameters:
            # As DeepSpeed does.
            grouped.param_groups[0]["params"] = [parameter]
            grouped.step()
        grouped.param_groups[0]["params"] = parameters
        for optimizer in (whole, grouped):
            optimizer.end(torch.zeros(()))
    assert whole.steps == grouped.steps == 3
    assert torch.equal(together, apart)
