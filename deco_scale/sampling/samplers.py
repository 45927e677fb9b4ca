"""ODE solvers from noise (t = 0) to image (t = 1) with classifier-free guidance.

Euler, Heun and Adams-Bashforth on non-uniform grids. Guidance takes one batched call for the conditional and the
unconditional velocity. Shape letters: B batch.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from deco_scale.objectives.flow_matching import shift_time
from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.guidance import VelocityFn, guidance_at, guided_velocity


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
    batch while guidance is on), one of Heun two, but the last, which costs one: it is Euler's, which leaves the
    order 2, since no training showed a velocity at t = 1, and that of a predicted image is 0 / 0 there.
    """
    times = time_grid(cfg.num_steps, cfg.timestep_shift)
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    on_device = times.to(x.device, x.dtype)

    def guided(x: Tensor, node: int) -> Tensor:
        """Velocity at a point of the time grid, guided or not as that time says."""
        scale, rescale = guidance_at(cfg, times[node]), cfg.guidance_rescale
        return guided_velocity(velocity, x, on_device[node], condition, null, scale, rescale=rescale).to(x.dtype)

    history: list[Tensor] = []
    for step in range(cfg.num_steps):
        width = on_device[step + 1] - on_device[step]
        v = guided(x, step)
        if cfg.solver == "adams":
            history = [*history, v][-cfg.order :]
            weights = adams_weights(times, step, cfg.order)
            v = torch.stack([w * h for w, h in zip(weights, history, strict=True)]).sum(0)
        elif cfg.solver == "heun" and step + 1 < cfg.num_steps:
            v = 0.5 * (v + guided(x + width * v, step + 1))
        x = x + width * v
        yield x


def sample(velocity: VelocityFn, noise: Tensor, condition: Tensor, null: Tensor, cfg: SamplerConfig) -> Tensor:
    """Final state of :func:`integrate`."""
    return deque(integrate(velocity, noise, condition, null, cfg), maxlen=1).pop()
