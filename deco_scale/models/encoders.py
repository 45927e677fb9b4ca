"""Frozen encoders: text embeddings by any ``transformers`` encoder, image tokens by DINOv2.

``transformers`` is imported when an encoder is loaded. Nothing is downloaded unless the configuration allows it;
for missing files :class:`ConfigError` says what to fetch.

Shape letters: B batch, L text tokens, T text width, C channels, Y X pixels, N patches, F encoder width.
"""

import hashlib
import logging
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deco_scale.errors import ConfigError
from deco_scale.models.config import EncoderPrecision, ImageEncoderConfig, TextEncoderConfig
from deco_scale.models.frozen import FrozenModel, weight_dtype

logger = logging.getLogger(__name__)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
DINO_PATCH = 14
LENGTH_MULTIPLE = 32
"""Texts are encoded at a multiple of this length, so that compiled layers see few shapes."""
_UNMASKED = "sdpa_without_mask"


class TextEncoder:
    """Last hidden states ``(B, L, T)`` of captions, right-padded to a fixed number of tokens.

    The null embedding is that of the empty caption, computed once.
    """

    def __init__(self, model: Any, tokenizer: Any, cfg: TextEncoderConfig, device: torch.device) -> None:
        self.model = FrozenModel(model, device, fp8=cfg.precision == "fp8")
        # The cache is for text generation: it would hold keys and values of every layer until the call ends.
        model.config.use_cache = False
        self._causal = _is_causal(model)
        # Padding stands behind the tokens of a text, where causal attention does not see it.
        self._unmasked = bool(self._causal) and cfg.zero_padding
        if self._unmasked:
            _attend_without_mask(model)
        self._tokenizer, self._cfg, self._device = tokenizer, cfg, device
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._null = self._padded([""])[0]

    @classmethod
    def load(cls, cfg: TextEncoderConfig, device: torch.device) -> "TextEncoder":
        """Load from a folder, the local hub cache, or the hub if downloads are allowed."""
        # transformers first: BertModel must be importable before anything imitates torchvision.
        from transformers import AutoModel, AutoTokenizer

        _quiet()
        folder = Path(cfg.path).expanduser()
        source = str(folder) if folder.is_dir() else cfg.path
        local_only = folder.is_dir() or not cfg.allow_download
        with _or_hint(_text_hint(cfg.path)):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local_only)
            options = {"local_files_only": local_only, "use_safetensors": True}
            model = _pretrained(AutoModel, source, weight_dtype(cfg.precision, device), **options)
        tokenizer.padding_side = "right"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model, tokenizer, cfg, device)

    @property
    def null(self) -> Tensor:
        """A copy of the empty caption's embedding ``(L, T)``."""
        return self._null.clone()

    @property
    def width(self) -> int:
        return self._null.shape[-1]

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``(B, L, T)`` in fp32; longer captions are truncated."""
        if not self._cfg.cache_captions:
            return self._padded(captions)
        new = [c for c in dict.fromkeys(captions) if c not in self._cache]
        if new:
            self._cache.update(zip(new, self._padded(new), strict=True))
        states = torch.stack([self._cache[c] for c in captions])
        for caption in captions:
            self._cache.move_to_end(caption)
        while len(self._cache) > self._cfg.cache_captions:
            self._cache.popitem(last=False)
        return states

    def encode_ragged(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings ``(tokens, T)`` of each caption, without padding if ``zero_padding``."""
        states, mask = self._states(captions)
        if not self._cfg.zero_padding:
            return list(states)
        return [each[:count] for each, count in zip(states, mask.sum(dim=1).tolist(), strict=True)]

    def _padded(self, captions: Sequence[str]) -> Tensor:
        """Embeddings ``(B, L, T)``."""
        states = self._states(captions)[0]
        return F.pad(states, (0, 0, 0, self._cfg.max_tokens - states.shape[1]))

    @torch.no_grad()
    def _states(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Embeddings ``(B, l, T)``, and the mask ``(B, l)`` of tokens that are not padding.

        ``l`` is L; with ``zero_padding`` the multiple of :data:`LENGTH_MULTIPLE` that holds the longest caption.
        """
        tokens = self._tokenizer(
            list(captions),
            max_length=self._cfg.max_tokens, truncation=True, padding="max_length", return_tensors="pt",
        )  # fmt: skip
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        if self._cfg.zero_padding:
            longest = max(1, int(mask.sum(dim=1).max()))
            length = LENGTH_MULTIPLE * math.ceil(longest / LENGTH_MULTIPLE)
            ids, mask = ids[:, :length], mask[:, :length]
        ids, mask = self._to_device(ids), self._to_device(mask)
        attends = None if self._unmasked else self._attention_mask(mask)
        states = self.model(len(captions), input_ids=ids, attention_mask=attends)
        if self._cfg.round_states:
            states = states.bfloat16()
        # Always fp32; the model's autocast casts again.
        states = states.float()
        return (states * mask[..., None] if self._cfg.zero_padding else states), mask

    def _attention_mask(self, mask_BL: Tensor) -> Tensor:
        """Mask ``(B, 1, L, L)`` of which token attends to which; ``mask_BL`` itself where that is not known.

        From ``mask_BL`` ``transformers`` makes the same mask, but reads on the host whether any token is padding,
        and a training step would wait for the device.
        """
        if self._causal is None:
            return mask_BL
        length = mask_BL.shape[1]
        allowed = mask_BL.bool()[:, None, None, :].expand(-1, 1, length, length)
        return allowed.tril() if self._causal else allowed

    def _to_device(self, tokens: Tensor) -> Tensor:
        # The host does not wait for a copy from page-locked memory.
        if self._device.type == "cuda":
            tokens = tokens.pin_memory()
        return tokens.to(self._device, non_blocking=True)


def load_text_encoder(cfg: TextEncoderConfig, text_dim: int, device: torch.device) -> TextEncoder:
    """The encoder of a model with ``text_dim`` values per token; raises :class:`ConfigError` for another width."""
    encoder = TextEncoder.load(cfg, device)
    if encoder.width != text_dim:
        raise ConfigError(
            f"text_encoder.path={cfg.path} gives {encoder.width} values per token, model.text_dim is {text_dim}"
        )
    return encoder


def _is_causal(model: Any) -> bool | None:
    """Whether tokens attend to earlier tokens only; None if layers differ or do not use SDPA."""
    kinds = {module.is_causal for module in model.modules() if hasattr(module, "is_causal")}
    layers = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if len(kinds) == 1 and not layers and model.config._attn_implementation in ("sdpa", _UNMASKED):
        return bool(kinds.pop())
    logger.warning(
        "text encoder %s: transformers builds its attention mask, which waits for the device at every call",
        type(model).__name__,
    )
    return None


def _attend_without_mask(model: Any) -> None:
    """Let the layers of a causal model call SDPA without a mask, which its flash kernels do not take.

    For an attention function without a mask function ``transformers`` makes none, and reads nothing on the host.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    AttentionInterface.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(_UNMASKED)


def text_identity(cfg: TextEncoderConfig, width: int) -> dict[str, Any]:
    """Everything that precomputed embeddings depend on; reads the encoder's files without loading it.

    ``revision`` is a digest of weights, configuration and tokenizer. Raises :class:`ConfigError` for missing
    files.
    """
    folder = Path(cfg.path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with _or_hint(_text_hint(cfg.path)):
            folder = Path(snapshot_download(cfg.path, local_files_only=not cfg.allow_download))
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json", ".txt", ".model"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return {
        "encoder": Path(cfg.path).name + (" in fp8" if cfg.precision == "fp8" else ""),
        "revision": digest.hexdigest()[:16],
        "width": width,
        "max_tokens": cfg.max_tokens,
        "zero_padding": cfg.zero_padding,
    }


def _quiet() -> None:
    """Turn off progress bars and warnings of ``transformers`` and torchao."""
    # transformers imports torchao if it is installed, which warns of each GPU library that it cannot load.
    logging.getLogger("torchao").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@contextmanager
def _or_hint(hint: str) -> Iterator[None]:
    """Turns what loading raises into a :class:`ConfigError` with what to do."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(f"{hint} ({first})") from error


def _pretrained(kind: Any, source: str | Path, dtype: torch.dtype, **options: Any) -> Any:
    """A model of the class ``kind`` with weights in ``dtype``; buffers such as rotary frequencies stay in fp32.

    Raises :class:`ConfigError` for missing weights, which ``transformers`` would initialize at random; the pooler
    is not needed for token embeddings.
    """
    where = None if "state_dict" in options else source
    model, loading = kind.from_pretrained(where, dtype=dtype, output_loading_info=True, **options)
    missing = sorted(key for key in loading["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ConfigError(f"{source} lacks {len(missing)} weights of its model, such as {missing[0]}")
    return model


def _text_hint(path: str) -> str:
    return (
        f"text encoder {path!r} is not here: fetch its config, tokenizer and *.safetensors "
        "(Qwen/Qwen3-1.7B for the published recipe) into that folder, set text_encoder.path to where "
        "they are, or set text_encoder.allow_download=true with a hub id"
    )


class ImageEncoder:
    """DINOv2 patch tokens ``(B, N, F)``, one per 16 x 16 pixels."""

    def __init__(self, model: Any, device: torch.device, precision: EncoderPrecision = "auto") -> None:
        self.model = FrozenModel(model, device, fp8=precision == "fp8")
        self._dtype, self._width = next(model.parameters()).dtype, int(model.config.hidden_size)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    @classmethod
    def load(cls, cfg: ImageEncoderConfig, device: torch.device) -> "ImageEncoder":
        """Load a ``transformers`` folder, or convert the original ``dinov2_vitb14_pretrain.pth``."""
        path = Path(cfg.path).expanduser()
        hint = (
            f"image encoder {cfg.path!r} is not here: fetch facebook/dinov2-base (config.json and "
            "model.safetensors) into a folder, or the file dinov2_vitb14_pretrain.pth, and set "
            "image_encoder.path to it; without REPA set objective.repa_weight=0"
        )
        if not path.exists():
            raise ConfigError(hint)
        from transformers import Dinov2Model

        _quiet()
        with _or_hint(hint):
            options = (
                {"local_files_only": True, "use_safetensors": True} if path.is_dir() else _from_original(path)
            )
            model = _pretrained(Dinov2Model, path, weight_dtype(cfg.precision, device), **options)
        return cls(model, device, cfg.precision)

    @property
    def width(self) -> int:
        return self._width

    @torch.no_grad()
    def encode(self, image_BCYX: Tensor) -> Tensor:
        """Final-norm patch tokens of clean images in [-1, 1] whose sides are multiples of 16."""
        height, width = (DINO_PATCH * (side // 16) for side in image_BCYX.shape[-2:])
        pixels = ((image_BCYX.float() + 1) / 2 - self._mean) / self._std
        pixels = F.interpolate(pixels, size=(height, width), mode="bicubic")
        return self.model(len(image_BCYX), pixel_values=pixels.to(self._dtype))[:, 1:]


_DINO_LAYER = {
    "norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    "attn.proj": "attention.output.dense", "ls1": "layer_scale1", "ls2": "layer_scale2",
}  # fmt: skip
_DINO_ROOT = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_HEAD_DIM = 64
"""Head width of every published DINOv2."""


def dinov2_from_original(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors of the original repository to those of the published ``facebook/dinov2-*`` files.

    Every version of ``transformers`` reads the published names. Splits the fused projection into three; raises
    ``KeyError`` for an unknown name.
    """
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name in _DINO_ROOT:
            converted[_DINO_ROOT[name]] = tensor
            continue
        head, layer, rest = name.split(".", 2)
        if head != "blocks":
            raise KeyError(f"unknown DINOv2 tensor {name}")
        prefix = f"encoder.layer.{int(layer)}."
        module, _, kind = rest.rpartition(".")
        if module == "attn.qkv":
            for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                converted[f"{prefix}attention.attention.{part}.{kind}"] = piece
        else:
            converted[f"{prefix}{_DINO_LAYER[module]}.{'lambda1' if kind == 'gamma' else kind}"] = tensor
    return converted


def _from_original(path: Path) -> dict[str, Any]:
    """Configuration and weights of the original file, as ``from_pretrained`` takes them."""
    from transformers import Dinov2Config

    state = torch.load(path, map_location="cpu", weights_only=True)
    positions = state["pos_embed"].shape[1] - 1
    width = state["cls_token"].shape[-1]
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks.")),
        num_attention_heads=max(1, width // _HEAD_DIM),
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] // width,
        image_size=DINO_PATCH * round(positions**0.5),
        patch_size=DINO_PATCH,
    )
    return {"config": config, "state_dict": dinov2_from_original(state)}
