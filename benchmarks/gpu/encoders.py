"""The frozen encoders of the recipe at their sizes, with random weights: as they are, and compiled layer by layer.

Nothing is downloaded: ``transformers`` builds the models from configurations. No GPU has run it yet.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.steps import compiler
from benchmarks.jobs.runner import CheckFailed, Found, NotAvailable, Where
from benchmarks.measure import device_name, median_s, synchronise
from deco_scale.models.config import TextEncoderConfig
from deco_scale.models.encoders import ImageEncoder, TextEncoder

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
    """Milliseconds of a micro-batch through each encoder, eager and compiled."""
    try:
        import transformers
    except ImportError as error:
        raise NotAvailable(f"transformers is missing: {error}") from error
    device = torch.device(where.device)
    batch, tokens, side = (2, 16, 32) if where.quick else (64, 128, 256)
    dtype = torch.bfloat16 if where.device == "cuda" else torch.float32
    print(f"transformers {transformers.__version__}")
    lines, failed = [], []
    with torch.no_grad():
        images = torch.rand(batch, 3, side, side, device=device) * 2 - 1
    for name in ("dinov2", "qwen3"):
        model: Any
        if name == "qwen3":
            sizes = TINY_QWEN3 if where.quick else QWEN3_1_7B
            model = _built(transformers.Qwen3Model, transformers.Qwen3Config(**sizes), device, dtype)
            settings = TextEncoderConfig(path=name, max_tokens=tokens)
            text = TextEncoder(model, RandomTokens(sizes["vocab_size"]), settings, device)
            action: Callable[[], Tensor] = lambda: text.encode(["a caption"] * batch)  # noqa: B023, E731
        else:
            sizes = TINY_DINOV2 if where.quick else DINOV2_B
            model = _built(transformers.Dinov2Model, transformers.Dinov2Config(**sizes), device, dtype)
            image = ImageEncoder(model, device)
            action = lambda: image.encode(images)  # noqa: B023, E731
        numbers: dict[str, Any] = {"micro_batch": batch, "device": device_name(device)}
        eager = _measured(numbers, "eager", action, device)
        where.write(name, numbers)
        with compiler(where.device):
            for layer in _layers(model):
                layer.compile(dynamic=False)
        compiled = _measured(numbers, "compiled", action, device)
        numbers["difference"] = ((compiled - eager).norm() / eager.norm()).item()
        where.write(name, numbers)
        lines.append(
            f"{name} {numbers['eager_ms']:.4g} ms eager, {numbers['compiled_ms']:.4g} ms compiled (first call "
            f"{numbers['compiled_first_s']:.0f} s)"
        )
        print(lines[-1], flush=True)
        # Random weights and bf16: rounding in another order moves a few percent, a wrong graph far more.
        if not numbers["difference"] < 0.1:
            failed.append(f"compiled {name} differs from eager by {numbers['difference']:.2e}")
        del model, action
    if failed:
        raise CheckFailed("; ".join(failed + lines))
    return Found(f"micro-batch {batch}: {'; '.join(lines)}")


def _built(kind: Any, config: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The model with random weights, drawn on its device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(config).eval()
    finally:
        torch.set_default_dtype(before)


def _layers(model: nn.Module) -> nn.ModuleList:
    """The stack of layers, by whatever name this version of transformers has it."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(lists, key=len)


def _measured(numbers: dict[str, Any], kind: str, action: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Time ``action`` into ``numbers`` and return what it gives."""
    began = time.perf_counter()
    out = action().float()
    synchronise(device)
    numbers[f"{kind}_first_s"] = time.perf_counter() - began
    numbers[f"{kind}_ms"] = 1e3 * median_s(action, repeats=3, device=device, warmup=1)
    return out
