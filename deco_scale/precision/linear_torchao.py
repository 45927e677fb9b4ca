"""FP8 linear of torchao; importing this module imports torchao."""

from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from deco_scale.precision.fp8 import Fp8Forward


class TorchaoLinear(Fp8Forward, Float8Linear):  # type: ignore[misc]
    """Scales each tensor by its own largest value."""


def torchao_linear(in_features: int, out_features: int, *, emulate: bool) -> TorchaoLinear:
    """A linear on the meta device without bias; ``emulate`` rounds to FP8 and multiplies in fp32."""
    # Weights are gathered in bf16, so that FSDP shards plain tensors as everywhere else.
    config = Float8LinearConfig(emulate=emulate, enable_fsdp_float8_all_gather=False)
    plain = nn.Linear(in_features, out_features, bias=False, device="meta")
    # The public function rather than the constructor: it also patches what inductor would compile wrongly.
    linear = convert_to_float8_training(plain, config=config)
    assert type(linear) is Float8Linear
    linear.__class__ = TorchaoLinear
    return linear
