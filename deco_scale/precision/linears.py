"""Base class of the FP8 linears.

A class, because ``torch.compile`` shares one graph between modules that run the same code. A ``forward`` set on
each instance would need a graph in each block, and blocks beyond Dynamo's limit would run eagerly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Fp8Forward(nn.Module):
    """Mixin before a backend's linear class, whose ``forward`` it calls.

    Without gradients (sampling between steps) it computes in autocast's dtype like any linear, because a sampler's
    batches have shapes that FP8 may not take. ``bias_share`` and ``release_weight``: see
    :func:`deco_scale.precision.fp8.apply_fp8`.
    """

    has_bias: bool
    bias_share: int = 1
    release_weight: bool = False

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            # torchao looks at CUDA's autocast only.
            x = x.to(torch.get_autocast_dtype(device))
        return self._with_bias_share(x) if self.bias_share > 1 else self._linear(x)

    def _with_bias_share(self, x: Tensor) -> Tensor:
        # Takes precedence over the parameter of the same name.
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
        """Save None in place of a view of the weight, which would keep the gathered weight alive."""

        def pack(tensor: Tensor) -> Tensor | None:
            return None if tensor._is_view() and tensor._base is self.weight else tensor

        def unpack(packed: Tensor | None) -> Tensor:
            # torchao saves the transposed weight.
            return self.weight.detach().t() if packed is None else packed  # type: ignore[operator,union-attr]

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return self._product(x)
