"""ODE solvers from noise (t = 0) to image (t = 1): Euler and Adams-Bashforth on non-uniform grids."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from deco_scale.objectives.flow import shift_time
from deco_scale.sampling.guidance import Guidance, VelocityFn, guided_velocity

Solver = Literal["euler", "adams"]
MAX_ORDER = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How to integrate; the defaults are the release's text-to-image settings."""

    solver: Solver = "adams"
    num_steps: int = 25
    order: int = 2
    guidance: float = 4.0
    guidance_min: float = 0.0
    guidance_max: float = 1.0
    timestep_shift: float = 3.0

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1")
        if not 1 <= self.order <= MAX_ORDER:
            raise ValueError(f"order={self.order} must be 1..{MAX_ORDER}")
        if self.timestep_shift <= 0:
            raise ValueError(f"timestep_shift={self.timestep_shift} must be positive")
        if not 0 <= self.guidance_min <= self.guidance_max <= 1:
            raise ValueError(f"guidance interval ({self.guidance_min}, {self.guidance_max}) must lie in [0, 1]")


def time_grid(num_steps: int, shift: float) -> Tensor:
    """``num_steps + 1`` fp32 times from 0 to 1: uniform, then shifted."""
    uniform = torch.linspace(0.0, 1.0 - 1.0 / num_steps, num_steps)
    return shift_time(torch.cat([uniform, torch.ones(1)]), shift)


def adams_weights(times: Tensor, step: int, order: int) -> list[float]:
    """Weights of the last velocities (oldest first) for the step from ``times[step]``; they sum to 1.

    They integrate, over the step, the Lagrange polynomial through the last ``order`` points (fewer at
    the start); for order 2 this is (1 + r, -r) with r = h_n / (2 h_(n-1)). Computed in float64.
    """
    count = min(order, step + 1)
    grid = times.double().numpy()
    nodes, start, end = grid[step - count + 1 : step + 1], grid[step], grid[step + 1]
    weights = []
    for i, node in enumerate(nodes):
        others = np.delete(nodes, i)
        # Shifted by the step's start, the polynomial stays well conditioned.
        basis = np.poly1d(others - start, r=True) / np.prod(node - others)
        integral = np.polyint(basis)
        weights.append(float((integral(end - start) - integral(0.0)) / (end - start)))
    return weights


def integrate(
    velocity: VelocityFn, noise: Tensor, condition: Tensor, null: Tensor, cfg: SamplerConfig
) -> Iterator[Tensor]:
    """Yield the state after each step; the last one is the sample, in fp32.

    ``null`` has the batch's shape already. Each step costs one call of ``velocity`` (of twice the
    batch while guidance is on).
    """
    times = time_grid(cfg.num_steps, cfg.timestep_shift)
    multistep = cfg.solver == "adams"
    guidance = Guidance(
        scale=cfg.guidance,
        interval_min=cfg.guidance_min,
        interval_max=cfg.guidance_max,
        closed_above=not multistep,
    )
    on_device = times.to(noise.device)
    x = noise.float()
    history: list[Tensor] = []
    for step in range(cfg.num_steps):
        scale = guidance.scale_at(times[step])
        v = guided_velocity(velocity, x, on_device[step], condition, null, scale).float()
        if multistep:
            history = [*history[-(cfg.order - 1) :], v] if cfg.order > 1 else [v]
            weights = adams_weights(times, step, cfg.order)
            v = torch.stack([w * h for w, h in zip(weights, history, strict=True)]).sum(0)
        x = x + (on_device[step + 1] - on_device[step]) * v
        yield x


def sample(velocity: VelocityFn, noise: Tensor, condition: Tensor, null: Tensor, cfg: SamplerConfig) -> Tensor:
    """Final state of :func:`integrate`."""
    x = noise
    for state in integrate(velocity, noise, condition, null, cfg):
        x = state
    return x
