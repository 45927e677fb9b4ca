"""ODE solvers from noise (t = 0) to image (t = 1): Euler, Heun and Adams-Bashforth on non-uniform grids."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from deco_scale.objectives.flow_matching import shift_time
from deco_scale.sampling.config import SamplerConfig, Solver
from deco_scale.sampling.guidance import Guidance, VelocityFn, guided_velocity


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
    """Yield the state after each step; the last one is the sample, in fp32 (float64 for noise in float64).

    ``null`` has the batch's shape already. A step of Euler and Adams costs one call of ``velocity`` (of twice the
    batch while guidance is on), one of Heun two, but the last, which costs one.
    """
    times = time_grid(cfg.num_steps, cfg.timestep_shift)
    guidance = Guidance(
        scale=cfg.guidance,
        interval_min=cfg.guidance_min,
        interval_max=cfg.guidance_max,
        closed_above=cfg.solver != "adams",
        rescale=cfg.guidance_rescale,
    )
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    on_device = times.to(x.device, x.dtype)

    def guided(x: Tensor, node: int) -> Tensor:
        """Velocity at a point of the time grid, guided or not as that time says."""
        scale = guidance.scale_at(times[node])
        v = guided_velocity(velocity, x, on_device[node], condition, null, scale, rescale=guidance.rescale)
        return v.to(x.dtype)

    advances: dict[Solver, Callable[[GuidedFn, Tensor, Tensor, int], Tensor]]
    advances = {"euler": _euler, "heun": _heun, "adams": _Adams(times, cfg.order)}
    advance = advances[cfg.solver]
    for step in range(cfg.num_steps):
        x = advance(guided, x, on_device, step)
        yield x


GuidedFn = Callable[[Tensor, int], Tensor]
"""Guided velocity of a state at a point of the time grid."""


def _euler(guided: GuidedFn, x: Tensor, times: Tensor, step: int) -> Tensor:
    return x + (times[step + 1] - times[step]) * guided(x, step)


def _heun(guided: GuidedFn, x: Tensor, times: Tensor, step: int) -> Tensor:
    """Trapezoidal rule with Euler's step as the prediction; each end is guided as its own time says.

    The last step is Euler's, which leaves the order 2: no training showed a velocity at t = 1, and that of a
    predicted image is 0 / 0 there.
    """
    width = times[step + 1] - times[step]
    v = guided(x, step)
    predicted = x + width * v
    if step + 2 == len(times):
        return predicted
    return x + width * (0.5 * (v + guided(predicted, step + 1)))


class _Adams:
    """Adams-Bashforth: the polynomial through the last guided velocities, integrated over the step."""

    def __init__(self, times: Tensor, order: int) -> None:
        self._times, self._order = times, order
        self._history: list[Tensor] = []

    def __call__(self, guided: GuidedFn, x: Tensor, times: Tensor, step: int) -> Tensor:
        self._history = [*self._history, guided(x, step)][-self._order :]
        weights = adams_weights(self._times, step, self._order)
        v = torch.stack([w * h for w, h in zip(weights, self._history, strict=True)]).sum(0)
        return x + (times[step + 1] - times[step]) * v


def sample(velocity: VelocityFn, noise: Tensor, condition: Tensor, null: Tensor, cfg: SamplerConfig) -> Tensor:
    """Final state of :func:`integrate`."""
    x = noise
    for state in integrate(velocity, noise, condition, null, cfg):
        x = state
    return x
