"""Fused AdamW and EMA: the kernel and its twin against the formula in float64, and what they must leave alone."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deco_scale.kernels.adamw import AdamWStep, AdamWTensors, adamw_ema
from deco_scale.kernels.select import Kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS: tuple[Kernels, ...] = ("torch", "triton")
# Below, at and above a chunk of 4096, a scalar, and an odd number; the interpreter takes one program at a time.
SHAPES = ((4096,), (1,), (3, 5), (4097,), (2, 8192))
LR, BETAS, EPS, DECAY, EMA = 1e-2, (0.9, 0.95), 1e-8, 0.1, 0.97


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def step_of(count: int, *, factor: float | None = None, skipped: float | None = None) -> AdamWStep:
    return AdamWStep(
        lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, ema_decay=EMA, count=scalar(float(count)),
        factor=None if factor is None else scalar(factor), skipped=None if skipped is None else scalar(skipped),
    )  # fmt: skip


def tensors_of(parameters: Sequence[Tensor], *, with_ema: Sequence[bool]) -> AdamWTensors:
    return AdamWTensors(
        parameters=parameters,
        grads=[torch.zeros_like(p) for p in parameters],
        exp_avgs=[torch.zeros_like(p) for p in parameters],
        exp_avg_sqs=[torch.zeros_like(p) for p in parameters],
        emas=[p.clone() if average else None for p, average in zip(parameters, with_ema, strict=True)],
    )


def random_parameters(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES]


def every(tensors: AdamWTensors) -> list[Tensor]:
    kinds = (tensors.parameters, tensors.exp_avgs, tensors.exp_avg_sqs, tensors.emas)
    return [tensor for kind in kinds for tensor in kind if tensor is not None]


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("factor", [None, 0.37])
def test_several_steps_equal_the_formula(kernels: Kernels, factor: float | None) -> None:
    with_ema = [True, False, True, True, False]
    ours = tensors_of(random_parameters(0), with_ema=with_ema)
    p, m, v = ([t.double() for t in kind] for kind in (ours.parameters, ours.exp_avgs, ours.exp_avg_sqs))
    averages = [t.clone() for t in p]
    for count in range(1, 5):
        for i, shape in enumerate(SHAPES):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 * count + i)).to(DEVICE)
            ours.grads[i].copy_(grad)
            g = grad.double() * (factor or 1.0)
            m[i] = BETAS[0] * m[i] + (1 - BETAS[0]) * g
            v[i] = BETAS[1] * v[i] + (1 - BETAS[1]) * g**2
            unbiased = v[i] / (1 - BETAS[1] ** count)
            p[i] = p[i] * (1 - LR * DECAY) - LR * m[i] / (1 - BETAS[0] ** count) / (unbiased.sqrt() + EPS)
            averages[i] = EMA * averages[i] + (1 - EMA) * p[i]
        adamw_ema(ours, step_of(count, factor=factor), kernels=kernels)
    wanted = [*p, *m, *v, *(a for a, kept in zip(averages, with_ema, strict=True) if kept)]
    for found, exact in zip(every(ours), wanted, strict=True):
        # Four steps of a few fp32 roundings (6e-8 each) of numbers up to about 4.
        torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_update_equals_torch_optim_adamw_and_lerp(kernels: Kernels) -> None:
    start = random_parameters(1)
    ours = tensors_of([p.clone() for p in start], with_ema=[True] * len(start))
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    averages = [p.clone() for p in start]
    adamw = torch.optim.AdamW(theirs, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, fused=True)
    for count in range(1, 4):
        for grad, parameter in zip(ours.grads, theirs, strict=True):
            grad.copy_(torch.randn(grad.shape, generator=torch.Generator().manual_seed(count)))
            parameter.grad = grad.clone()
        adamw_ema(ours, step_of(count), kernels=kernels)
        adamw.step()
        for average, parameter in zip(averages, theirs, strict=True):
            average.lerp_(parameter.detach(), 1 - EMA)
    wanted: list[Tensor] = [t.detach() for t in theirs]
    wanted += [adamw.state[t][kind] for kind in ("exp_avg", "exp_avg_sq") for t in theirs]
    for found, other in zip(every(ours), [*wanted, *averages], strict=True):
        if kernels == "torch":
            assert torch.equal(found, other)
        # Three steps of a few fp32 roundings (6e-8 each) of numbers up to about 4.
        torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("count", [1, 100_000])
def test_bias_correction_of_slow_betas_keeps_its_digits(kernels: Kernels, count: int) -> None:
    tensors = tensors_of([torch.zeros(8, device=DEVICE)], with_ema=[False])
    tensors.grads[0].fill_(0.5)
    beta1, beta2 = 0.99, 0.9999
    step = AdamWStep(
        lr=1.0, betas=(beta1, beta2), eps=1e-12, weight_decay=0.0, ema_decay=0.0, count=scalar(float(count)),
        factor=None, skipped=None,
    )  # fmt: skip
    adamw_ema(tensors, step, kernels=kernels)
    first, second = (1 - beta1) * 0.5, (1 - beta2) * 0.25
    wanted = -(first / (1 - beta1**count)) / math.sqrt(second / (1 - beta2**count))
    # 1 - 0.9999 in fp32 arithmetic would be wrong by 6e-4; its root by half of that.
    assert tensors.parameters[0].tolist() == pytest.approx([wanted] * 8, rel=2e-6)


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_skipped_step_changes_no_bit_whatever_the_gradient(kernels: Kernels) -> None:
    tensors = tensors_of(random_parameters(2), with_ema=[True] * len(SHAPES))
    for grad in tensors.grads:
        grad.fill_(math.nan)
    for moments in (tensors.exp_avgs, tensors.exp_avg_sqs):
        for moment in moments:
            moment.uniform_()
    before = [t.clone() for t in every(tensors)]
    adamw_ema(tensors, step_of(3, factor=math.nan, skipped=1.0), kernels=kernels)
    assert all(torch.equal(a, b) for a, b in zip(before, every(tensors), strict=True))
    for grad in tensors.grads:
        grad.fill_(1.0)
    adamw_ema(tensors, step_of(3, factor=1.0, skipped=0.0), kernels=kernels)
    assert not any(torch.equal(a, b) for a, b in zip(before, every(tensors), strict=True))


@pytest.mark.parametrize("kernels", KERNELS)
def test_unaligned_tensors_are_updated_and_their_neighbours_are_not(kernels: Kernels) -> None:
    # Shards of a gradient lie side by side in one buffer, at addresses that 16 need not divide.
    pools = [torch.full((3 * 4099,), 7.0, device=DEVICE) for _ in range(5)]
    # Two tensors each, with a gap of one before, between and behind.
    cuts = [[pool[1:4098], pool[4099:8200]] for pool in pools]
    parameters, grads, exp_avgs, exp_avg_sqs, averages = cuts
    for grad in grads:
        grad.fill_(3.0)
    tensors = AdamWTensors(
        parameters=parameters, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, emas=averages
    )
    adamw_ema(tensors, step_of(1), kernels=kernels)
    for pool, written in zip(pools, (True, False, True, True, True), strict=True):
        outside = [pool[:1], pool[4098:4099], pool[8200:]]
        assert all(bool((part == 7.0).all()) for part in outside)
        assert not written or not bool((torch.cat([pool[1:4098], pool[4099:8200]]) == 7.0).any())


def test_unsupported_tensors_are_refused() -> None:
    good = torch.zeros(4, 6)
    for bad in (good.half(), good.t(), good[:, ::2], torch.zeros(0)):
        with pytest.raises(ValueError, match="contiguous fp32 tensors"):
            tensors_of([good, bad], with_ema=[True, True])
    with pytest.raises(ValueError, match=r"\(4, 6\)"):
        AdamWTensors(
            parameters=[good], grads=[good.t().contiguous()], exp_avgs=[good], exp_avg_sqs=[good], emas=[None]
        )
