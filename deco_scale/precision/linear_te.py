"""FP8 linear of Transformer Engine; importing this module imports that package."""

import torch
from torch import Tensor
from transformer_engine.pytorch import Linear

from deco_scale.models.compile import outside_graphs
from deco_scale.precision.linears import Fp8Forward


class TeLinear(Fp8Forward, Linear):  # type: ignore[misc]
    """Computes in FP8 inside of Transformer Engine's context."""

    @outside_graphs
    def _product(self, x: Tensor) -> Tensor:
        # A graph break in compiled blocks.
        return super()._product(x)


def te_linear(in_features: int, out_features: int, *, bias: bool) -> TeLinear:
    """A linear on the meta device, with parameters named as in ``nn.Linear``."""
    return TeLinear(in_features, out_features, bias=bias, params_dtype=torch.float32, device="meta")
