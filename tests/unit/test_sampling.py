"""Solvers: order of convergence, guidance, grids."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deco_scale.sampling import Guidance, SamplerConfig, guided_velocity, sample, time_grid
from deco_scale.sampling.graphs import Graphed
from deco_scale.sampling.pictures import make_pictures, save_grid, to_uint8
from deco_scale.sampling.solvers import adams_weights


def error_of(cfg: SamplerConfig) -> float:
    """Error at t = 1 of dx/dt = x * cos(3t), whose solution is x0 * exp(sin(3t) / 3)."""

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return x * torch.cos(3 * t.double()).view(-1, 1)

    start = torch.ones(1, 1)
    result = sample(velocity, start, torch.zeros(1), torch.zeros(1), cfg)
    return abs(result.item() - math.exp(math.sin(3.0) / 3))


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("adams", 1), ("adams", 2)])
def test_error_falls_with_the_solver_order(solver: str, order: int) -> None:
    def error(steps: int) -> float:
        return error_of(
            SamplerConfig(solver=solver, num_steps=steps, order=order, guidance=1.0, timestep_shift=1.5)  # type: ignore[arg-type]
        )

    # Halving the step divides the error by 2**order; at 40 steps fp32 is still far below it.
    assert error(20) / error(40) == pytest.approx(2**order, rel=0.2)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_integrate_polynomials_exactly(order: int) -> None:
    # The whole solver cannot show orders 3 and 4, since its first steps are of lower order.
    times = time_grid(12, 3.0).double()
    for step in (0, 2, 9):
        weights = adams_weights(times, step, order)
        nodes = times[step + 1 - len(weights) : step + 1]
        start, end = times[step], times[step + 1]
        for power in range(len(weights)):
            found = (torch.tensor(weights, dtype=torch.float64) * nodes**power).sum() * (end - start)
            wanted = (end ** (power + 1) - start ** (power + 1)) / (power + 1)
            assert found.item() == pytest.approx(wanted.item(), rel=1e-9, abs=1e-12)


def test_second_order_weights_are_the_published_ones() -> None:
    times = time_grid(10, 3.0)
    steps = times.diff().double()
    r = (steps[4] / (2 * steps[3])).item()
    assert adams_weights(times, 4, 2) == pytest.approx([-r, 1 + r], rel=1e-6)
    for order in (1, 2, 3, 4):
        assert sum(adams_weights(times, 7, order)) == pytest.approx(1.0)
        assert len(adams_weights(times, 1, order)) == min(order, 2)


def test_interval_is_compared_in_fp32() -> None:
    # The shifted grid can hold exactly fp32(0.1), which as a Python float is greater than 0.1.
    guidance = Guidance(scale=4.0, interval_min=0.1)
    assert guidance.scale_at(torch.tensor(0.1, dtype=torch.float32)) == 1.0
    assert guidance.scale_at(torch.tensor(0.11)) == 4.0
    assert guidance.scale_at(torch.tensor(1.0)) == 4.0
    assert Guidance(scale=4.0, closed_above=False).scale_at(torch.tensor(1.0)) == 1.0


def test_guidance_extrapolates_from_the_null_condition() -> None:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.expand_as(x)

    x, one, zero = torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 1)
    assert guided_velocity(velocity, x, torch.tensor(0.5), one, zero, 3.0).tolist() == [[3.0], [3.0]]
    assert guided_velocity(velocity, x, torch.tensor(0.5), one, zero, 1.0).tolist() == [[1.0], [1.0]]


def test_pictures_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        return condition.view(-1, 1, 1, 1) - x

    cfg = SamplerConfig(num_steps=4)
    conditions, null = torch.tensor([0.1, 0.2, 0.3]), torch.tensor(0.0)
    made = [make_pictures(velocity, conditions, null, [5, 6, 7], size=(8, 8), cfg=cfg, batch=b) for b in (1, 3)]
    assert np.array_equal(*made)
    save_grid(made[0], tmp_path / "grid.png", columns=2, labels=["a", "b", "c"], scale=4)
    assert (tmp_path / "grid.png").stat().st_size > 100


def test_graphs_without_a_gpu_are_refused() -> None:
    with pytest.raises(ValueError, match="need a GPU, this process computes on cpu"):
        Graphed(lambda x, t, condition: x, torch.device("cpu"))


def test_rounding_to_bytes() -> None:
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize("bad", [{"num_steps": 0}, {"order": 5}, {"timestep_shift": 0.0}, {"guidance_max": 2.0}])
def test_impossible_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad)).split("_")[0]):
        SamplerConfig(**bad)  # type: ignore[arg-type]
