"""The ends of the guidance interval when they fall exactly on a time of the grid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deco_scale.sampling import SamplerConfig, sample, time_grid

ADAMS: list[dict[str, Any]] = [{"solver": "adams", "order": order} for order in (1, 2, 3, 4)]


def guided_times(cfg: SamplerConfig) -> tuple[list[float], list[float]]:
    """Times of the velocities computed, and those of them with guidance, which takes a batch of twice the size."""
    times, guided = [], []

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        times.append(float(t[0]))
        if len(x) == 2:
            guided.append(times[-1])
        return torch.ones_like(x)

    sample(velocity, torch.zeros(1, 1), torch.zeros(1), torch.zeros(1), cfg)
    return times, guided


@pytest.mark.parametrize("solver", [*ADAMS, {"solver": "euler"}, {"solver": "heun"}], ids=str)
@pytest.mark.parametrize(("num_steps", "node"), [(4, 2), (10, 6), (10, 7)])
def test_guidance_max_on_a_grid_time_is_excluded_by_adams_and_included_by_others(
    solver: dict[str, Any], num_steps: int, node: int
) -> None:
    """``guidance_max`` as a user writes it: 0.5, 0.6 (rounded up in fp32) or 0.7 (rounded down)."""
    cfg = SamplerConfig(
        num_steps=num_steps, guidance=2.0, guidance_max=node / num_steps, timestep_shift=1.0, **solver
    )
    grid = time_grid(num_steps, 1.0)
    assert grid[node] == torch.tensor(node / num_steps, dtype=torch.float32)
    times, guided = guided_times(cfg)
    last = node - 1 if cfg.solver == "adams" else node
    assert set(guided) == set(grid[1 : last + 1].tolist())
    assert set(times) == set(grid[:-1].tolist())


@pytest.mark.parametrize("solver", ADAMS, ids=str)
def test_shifted_grid_time_as_guidance_max_is_excluded_by_adams(solver: dict[str, Any]) -> None:
    grid = time_grid(9, 3.0)
    cfg = SamplerConfig(num_steps=9, guidance=2.0, guidance_max=grid[5].item(), timestep_shift=3.0, **solver)
    assert guided_times(cfg)[1] == grid[1:5].tolist()


@pytest.mark.parametrize("solver", ADAMS, ids=str)
def test_guidance_min_on_a_grid_time_is_excluded(solver: dict[str, Any]) -> None:
    cfg = SamplerConfig(num_steps=4, guidance=2.0, guidance_min=0.25, timestep_shift=1.0, **solver)
    assert guided_times(cfg)[1] == [0.5, 0.75]
