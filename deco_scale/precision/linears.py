"""What a linear in FP8 does around its backend's product; a class of its own, so that blocks share their graphs.

``torch.compile`` keeps one graph for all modules that run the same code. A ``forward`` put on each instance is
another object in each block: another graph for each, and none for the blocks past Dynamo's limit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp8Forward(nn.Module):
    """Goes in front of a backend's linear class, whose ``forward`` it calls.

    Without gradients (images sampled between steps) it computes in autocast's type like any linear: a sampler's
    batches have shapes that FP8 may not take. ``bias_share``: each of so many ranks adds its share of the bias.
    ``release_weight`` keeps no gathered weight alive between forward and backward but looks it up again.
    """

    has_bias: bool
    bias_share: int = 1
    release_weight: bool = False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # torchao asks for CUDA's autocast only, on any device.
            x = x.to(torch.get_autocast_dtype(device))
        return self._with_bias_share(x) if self.bias_share > 1 else self._linear(x)

    def _with_bias_share(self, x: Tensor) -> Tensor:
        # Found before the parameter of this name.
        self.__dict__["bias"] = self._parameters["bias"] / self.bias_share  # type: ignore[operator]
        try:
            return self._linear(x)
        finally:
            del self.__dict__["bias"]

    def _linear(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(x, self.weight, self.bias if self.has_bias else None)  # type: ignore[arg-type]
        return self._without_kept_weight(x) if self.release_weight else self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        """The backend's linear."""
        return super().forward(x)  # type: ignore[misc,no-any-return]

    def _without_kept_weight(self, x: Tensor) -> Tensor:
        """Save a mark in the place of a view of the weight, whose storage would stay with it."""

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor._is_view() and tensor._base is self.weight else tensor

        def unpack(packed: Tensor | None) -> Tensor:
            # torchao saves the transposed weight.
            return self.weight.detach().t() if packed is None else packed  # type: ignore[operator,union-attr]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self._product(x)
