"""The path from a batch to an update on one device, without sharding, for devices that hold no values."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from deco_scale.config import RunConfig
from deco_scale.kernels import Kernels, use_kernels
from deco_scale.models import Denoiser
from deco_scale.objectives import Objective
from deco_scale.optim.adamw_ema import AdamWWithEMA, nan_if_nonfinite
from deco_scale.parallel.engines.base import EMA_PREFIX, Update
from deco_scale.precision.config import autocast
from deco_scale.training.inputs import ObjectiveInputs


def put_on(module: nn.Module, device: torch.device) -> nn.Module:
    """Memory on ``device`` for a module built on ``meta``; ``to`` then has nothing to do.

    PyTorch's own ``to_empty`` exchanges tensors in place, which fake ones refuse.
    """
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    made: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    held[name] = nn.Parameter(made) if held is child._parameters else made
    module.to = lambda target: module  # type: ignore[method-assign,assignment,misc]
    return module


def make_objective(cfg: RunConfig, device: torch.device, *, kernels: Kernels, encoder_dim: int = 768) -> Objective:
    """Built on ``meta`` and given fp32 weights on ``device``."""
    with torch.device("meta"):
        objective = Objective(Denoiser(cfg.model), cfg.objective, encoder_dim=encoder_dim)
    put_on(objective, device)
    use_kernels(objective, kernels)
    for block in objective.denoiser.transformer_blocks:
        block.attn.backend = cfg.attention.backend  # type: ignore[union-attr]
    return objective


class PlainEngine:
    """What FsdpEngine does between a batch and an update, on one rank.

    On ``cuda`` there is no backward, which asks a driver even for fake tensors: gradients are what the parameters
    are like.
    """

    def __init__(self, objective: Objective, cfg: RunConfig, device: torch.device, *, kernels: Kernels) -> None:
        self._objective, self._cfg, self._device = objective, cfg, device
        self._parameters = dict(objective.named_parameters())
        self.optimizer = AdamWWithEMA(self._parameters.values(), cfg.optimizer, kernels=kernels)
        self.optimizer.track(self._parameters, averaged={n for n in self._parameters if n.startswith(EMA_PREFIX)})

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        with autocast(self._cfg.precision, self._device):
            losses = self._objective(*inputs)
        loss = nan_if_nonfinite(losses["loss"] * scale)
        if self._device.type == "meta":
            loss.backward()
        else:
            for parameter in self._parameters.values():
                parameter.grad = torch.empty_like(parameter)
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        grads = [p.grad for p in self._parameters.values() if p.grad is not None]
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        self.optimizer.begin(lr=lr, betas=betas, norm=norm, should_skip=should_skip)
        self.optimizer.step()
        for parameter in self._parameters.values():
            parameter.grad = None
        assert self.optimizer.skipped is not None
        self.optimizer.end(self.optimizer.skipped)
        return Update(norm, self.optimizer.skipped)
