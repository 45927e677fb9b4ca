"""Learning rate of a step: PyTorch's schedulers, resumes, stages, scaling with the batch, refused settings."""

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from deco_scale.optim.lr_schedule import LrScheduleConfig, batch_factor
from deco_scale.training.config import StageConfig
from deco_scale.training.trainer import Stage

STEPS, WARMUP, DECAY, FLOOR = 60, 8, 20, 0.1
KINDS: list[dict[str, Any]] = [
    {"kind": "constant"},
    {"kind": "cosine", "min_lr_ratio": FLOOR},
    {"kind": "wsd", "decay_steps": DECAY, "min_lr_ratio": FLOOR},
]


def stage(steps: int = STEPS, **fields: Any) -> StageConfig:
    fixed = {"name": "s", "resolution": 16, "micro_batch": 1, "lr": 2e-4}
    return StageConfig(**{**fixed, "global_batch": 1536, **fields}, steps=steps)


def torch_rates(kind: str, lr: float) -> list[float]:
    """The rates of all steps by PyTorch's schedulers, one after the other."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    warmup = LinearLR(optimizer, start_factor=1 / WARMUP, total_iters=WARMUP - 1)
    flat = ConstantLR(optimizer, factor=1.0)
    phases: list[LRScheduler] = [warmup, flat]
    milestones = [WARMUP]
    if kind == "cosine":
        phases[1] = CosineAnnealingLR(optimizer, T_max=STEPS - WARMUP, eta_min=FLOOR * lr)
    elif kind == "wsd":
        phases.append(LinearLR(optimizer, start_factor=1.0, end_factor=FLOOR, total_iters=DECAY))
        milestones.append(STEPS - DECAY)
    schedule = SequentialLR(optimizer, phases, milestones)
    rates = []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings["kind"])
def test_rates_are_those_of_the_schedulers_of_pytorch(settings: dict[str, Any]) -> None:
    cfg = stage(lr_schedule=LrScheduleConfig(warmup_steps=WARMUP, **settings))
    rates = [cfg.lr_at(step) for step in range(1, STEPS + 1)]
    assert rates == pytest.approx(torch_rates(settings["kind"], 2e-4), rel=1e-12)
    assert rates[WARMUP - 1] == max(rates) == 2e-4 and rates[0] == 2e-4 / WARMUP


@pytest.mark.parametrize("settings", KINDS, ids=lambda settings: settings["kind"])
def test_a_resume_in_a_later_stage_sees_the_same_rates_bit_for_bit(settings: dict[str, Any]) -> None:
    def rates(first: int, last: int) -> list[float]:
        schedule = LrScheduleConfig(warmup_steps=WARMUP, **settings)
        second = Stage(cfg=stage(lr_schedule=schedule), accumulation=1, image_flops=1.0, start=100)
        return [second.lr_at(step) for step in range(first, last + 1)]

    whole = rates(101, 160)
    assert rates(131, 160) == whole[30:]
    assert whole == [stage(lr_schedule=LrScheduleConfig(warmup_steps=WARMUP, **settings)).lr_at(n + 1)
                     for n in range(STEPS)]  # fmt: skip


def test_the_default_is_the_constant_rate_of_the_release() -> None:
    assert {stage().lr_at(step) for step in (1, 2, STEPS)} == {2e-4}


def test_rates_scale_with_the_batch_and_name_the_reference() -> None:
    scaled = {
        kind: stage(global_batch=12_288, lr_scaling=kind, lr_reference_batch=1536).lr_at(1)
        for kind in ("none", "sqrt", "linear")
    }
    assert scaled == pytest.approx({"none": 2e-4, "sqrt": 2e-4 * 8**0.5, "linear": 1.6e-3})
    assert batch_factor("sqrt", batch=512, reference_batch=512) == 1.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_scaling": "sqrt"}, "lr_scaling=sqrt needs lr_reference_batch"),
        ({"lr_scaling": "sqrt", "lr_reference_batch": 0}, "lr_reference_batch=0 must be at least 1"),
        ({"lr_schedule": {"warmup_steps": 61}}, "warmup_steps . decay_steps = 61 is more than steps=60"),
        ({"lr_schedule": {"kind": "wsd"}}, "kind wsd needs decay_steps"),
        ({"lr_schedule": {"kind": "cosine", "decay_steps": 9}}, "decay_steps=9 with kind=cosine"),
        ({"lr_schedule": {"warmup_steps": -1}}, "must not be negative"),
        ({"lr_schedule": {"min_lr_ratio": 1.5}}, "min_lr_ratio=1.5 must be in"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        if "lr_schedule" in fields:
            fields = fields | {"lr_schedule": LrScheduleConfig(**fields["lr_schedule"])}
        stage(**fields)
