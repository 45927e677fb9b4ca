"""The path from a batch to an update on one device, without sharding, for devices that hold no values."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.train import plain_engine
from deco_scale.config import RunConfig
from deco_scale.kernels.select import Kernels, use_kernels
from deco_scale.models import Denoiser
from deco_scale.objectives import Objective


def put_on(module: nn.Module, device: torch.device) -> nn.Module:
    """Allocate a module built on ``meta`` on ``device``; ``to`` then has nothing to do.

    PyTorch's own ``to_empty`` exchanges tensors in place, which fake ones refuse.
    """
    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    made: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    tensors[name] = nn.Parameter(made) if tensors is child._parameters else made
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


class PlainEngine(plain_engine.PlainEngine):
    """One rank of several. On ``cuda`` gradients are empty tensors: backward asks a driver even for fake ones."""

    def backward(self, loss: Tensor) -> None:
        if self._device.type == "meta":
            loss.backward()
            return
        for parameter in self.objective.parameters():
            parameter.grad = torch.empty_like(parameter)

    def grad_norm(self) -> Tensor:
        grads = [p.grad for p in self.objective.parameters() if p.grad is not None]
        square = torch.stack(torch._foreach_norm(grads)).square().sum()
        dist.all_reduce(square)
        return square.sqrt()
