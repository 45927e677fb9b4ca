"""``transformers`` models that are only evaluated: weights in bf16 or FP8, layers compiled.

Tested on a CPU; no GPU has run it compiled or in FP8.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deco_scale.errors import ConfigError
from deco_scale.models.compile import STATIC_GRAPHS, compile_errors, limit_recompiles, short_reason
from deco_scale.models.config import EncoderPrecision

logger = logging.getLogger(__name__)

_FP8_CAPABILITY = (8, 9)
_FP8_MULTIPLE = 16
"""Features that an FP8 matrix product takes: multiples of this."""


class FrozenModel:
    """Last hidden states of ``module``, moved to ``device`` and without gradients; its layers may be compiled.

    ``fp8`` computes the linear layers of its stack in FP8: weights are converted once, with a scale for each row,
    activations in every call, with a scale for each token. Raises :class:`ConfigError` where that does not work.
    """

    def __init__(self, module: Any, device: torch.device, *, fp8: bool = False) -> None:
        self.module = module.to(device).eval().requires_grad_(False)
        self._name, self._compiled_for = type(module).__name__, frozenset[int]()
        self._has_compiled_layers = False
        if fp8:
            _quantize_to_fp8(self._layers(), device)

    def compile(self, batch_sizes: Iterable[int], *, backend: Any = "inductor") -> None:
        """Compile the layers, at the first call, for batches of ``batch_sizes``; others stay eager.

        Layers of the same code share a graph for each shape. If compilation fails, the model runs eagerly.
        """
        limit_recompiles()
        for layer in self._layers():
            layer.compile(**STATIC_GRAPHS, backend=backend)
        self._compiled_for, self._has_compiled_layers = frozenset(batch_sizes), True

    @torch.no_grad()
    def __call__(self, batch_size: int, **inputs: Any) -> Tensor:
        """The last hidden state of ``module(**inputs)``."""
        if not self._has_compiled_layers:
            return self._forward(inputs)
        if batch_size in self._compiled_for:
            try:
                return self._forward(inputs)
            except compile_errors() as error:
                logger.warning("fallback: %s runs uncompiled from here on (%s)", self._name, short_reason(error))
                self._compiled_for = frozenset()
        with torch.compiler.set_stance("force_eager"):
            return self._forward(inputs)

    def _forward(self, inputs: dict[str, Any]) -> Tensor:
        states: Tensor = self.module(**inputs).last_hidden_state
        return states

    def _layers(self) -> nn.ModuleList:
        """The stack of layers, whatever this version of ``transformers`` calls it."""
        lists = (module for module in self.module.modules() if isinstance(module, nn.ModuleList))
        return max(lists, key=len, default=nn.ModuleList())


def weight_dtype(precision: EncoderPrecision, device: torch.device) -> torch.dtype:
    """Type in which an encoder's weights are loaded."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if precision == "fp32" else torch.bfloat16


def has_fp8(device: torch.device) -> bool:
    """Whether the device multiplies matrices in FP8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def _quantize_to_fp8(layers: nn.Module, device: torch.device) -> None:
    if not has_fp8(device):
        raise ConfigError(
            "precision: fp8 of an encoder needs a GPU of compute capability 8.9 or higher (Ada, Hopper, "
            "Blackwell); possible here: bf16, fp32"
        )
    try:
        from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_
    except ImportError as error:
        raise ConfigError(
            f"precision: fp8 of an encoder needs torchao: pip install torchao; possible without it: bf16 ({error})"
        ) from error

    def fits(module: nn.Module, name: str) -> bool:
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
        return not any(size % _FP8_MULTIPLE for size in sizes)

    # By default torchao also changes Inductor's settings, for the denoiser as well.
    config = Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False)
    quantize_(layers, config, filter_fn=fits)
