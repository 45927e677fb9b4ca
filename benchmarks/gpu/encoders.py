"""The frozen encoders of the recipe at their sizes, with random weights: eager, compiled, and compiled in FP8.

Nothing is downloaded: ``transformers`` builds the models from configurations. No GPU has run it yet.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.jobs.runner import CheckFailed, Found, NotAvailable, Where
from benchmarks.measure import device_name, median_s, synchronise
from deco_scale.errors import ConfigError
from deco_scale.models.config import EncoderPrecision, TextEncoderConfig
from deco_scale.models.encoders import ImageEncoder, TextEncoder
from deco_scale.models.frozen import FrozenModel

QWEN3_1_7B: dict[str, Any] = {
    "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip
DINOV2_B: dict[str, Any] = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "mlp_ratio": 4, "image_size": 518,
    "patch_size": 14,
}  # fmt: skip
TINY_QWEN3: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 64,
}  # fmt: skip
TINY_DINOV2: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
MAX_DIFFERENCE = {"compiled": 0.1, "fp8": 0.5}
"""Relative, from the eager states. With random weights and bf16, rounding in another order moves a few percent,
and FP8 tens of percent over 28 layers; a wrong graph far more."""


@dataclasses.dataclass(frozen=True)
class RandomTokens:
    """Stands in for a tokenizer: random tokens for each caption, from a quarter of the maximum length to all."""

    vocabulary: int

    def __call__(self, captions: list[str], *, max_length: int, **options: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary, (len(captions), max_length), generator=generator)
        lengths = torch.randint(max_length // 4, max_length + 1, (len(captions), 1), generator=generator)
        return {"input_ids": ids, "attention_mask": (torch.arange(max_length) < lengths).long()}


def encoders(where: Where) -> Found:
    """Milliseconds of a micro-batch through each encoder: eager, compiled, and compiled in FP8.

    ``unmasked``: the text encoder compiled with zero padding, so that it needs no attention mask.
    """
    try:
        import transformers
    except ImportError as error:
        raise NotAvailable(f"transformers is missing: {error}") from error
    device = torch.device(where.device)
    batch, tokens, side = (2, 16, 32) if where.quick else (64, 128, 256)
    dtype = torch.bfloat16 if where.device == "cuda" else torch.float32
    print(f"transformers {transformers.__version__}")
    with torch.no_grad():
        images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    text_sizes, image_sizes = (TINY_QWEN3, TINY_DINOV2) if where.quick else (QWEN3_1_7B, DINOV2_B)
    qwen3 = _built(transformers.Qwen3Model, transformers.Qwen3Config(**text_sizes), device, dtype)
    dinov2 = _built(transformers.Dinov2Model, transformers.Dinov2Config(**image_sizes), device, dtype)

    def prepared(
        name: str, precision: EncoderPrecision, *, zero_padding: bool = False
    ) -> tuple[FrozenModel, Callable[[], Tensor]]:
        """The model, and a call of its encoder; FP8 converts its weights for good."""
        if name == "dinov2":
            image = ImageEncoder(dinov2, device, precision)
            return image.model, lambda: image.encode(images)
        settings = TextEncoderConfig(path=name, max_tokens=tokens, precision=precision, zero_padding=zero_padding)
        text = TextEncoder(qwen3, RandomTokens(text_sizes["vocab_size"]), settings, device)
        return text.model, lambda: text.encode(["a caption"] * batch)

    found: dict[str, dict[str, Any]] = {}
    failed, eager = [], {}
    # On a CPU, graphs are run as they are: compiling C++ for them takes minutes.
    backend = "inductor" if where.device == "cuda" else "aot_eager"
    for name in ("dinov2", "qwen3"):
        numbers = found[name] = {"micro_batch": batch, "device": device_name(device)}
        model, action = prepared(name, "auto")
        eager[name] = _measured(numbers, "eager", action, device)
        where.write(name, numbers)
        model.compile([batch], backend=backend)
        failed += _compared(numbers, name, "compiled", eager[name], action, device)
        where.write(name, numbers)
    model, action = prepared("qwen3", "auto", zero_padding=True)
    model.compile([batch], backend=backend)
    _measured(found["qwen3"], "unmasked", action, device)
    where.write("qwen3", found["qwen3"])
    for name, numbers in found.items():
        try:
            model, action = prepared(name, "fp8")
        except ConfigError as error:
            print(f"no FP8: {error}")
            break
        model.compile([batch], backend=backend)
        failed += _compared(numbers, name, "fp8", eager[name], action, device)
        where.write(name, numbers)
    lines = []
    for name, numbers in found.items():
        kinds = ("eager", "compiled", "unmasked", "fp8")
        times = [f"{numbers[f'{kind}_ms']:.4g} ms {kind}" for kind in kinds if f"{kind}_ms" in numbers]
        lines.append(f"{name} {', '.join(times)}")
    if failed:
        raise CheckFailed("; ".join(failed + lines))
    return Found(f"micro-batch {batch}: {'; '.join(lines)}")


def _compared(
    numbers: dict[str, Any],
    name: str,
    kind: str,
    eager: Tensor,
    action: Callable[[], Tensor],
    device: torch.device,
) -> list[str]:
    """Time ``action`` into ``numbers``; what is wrong with its result, if anything."""
    out = _measured(numbers, kind, action, device)
    difference = numbers[f"{kind}_difference"] = ((out - eager).norm() / eager.norm()).item()
    print(f"{name} {kind} {numbers[f'{kind}_ms']:.4g} ms, eager {numbers['eager_ms']:.4g} ms", flush=True)
    return [] if difference < MAX_DIFFERENCE[kind] else [f"{kind} {name} differs from eager by {difference:.2e}"]


def _built(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, drawn on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def _measured(numbers: dict[str, Any], kind: str, action: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Time ``action`` into ``numbers`` and return what it gives."""
    began = time.perf_counter()
    out = action().float()
    synchronise(device)
    numbers[f"{kind}_first_s"] = time.perf_counter() - began
    numbers[f"{kind}_ms"] = 1e3 * median_s(action, repeats=3, device=device, warmup=1)
    return out
