"""CLIP score: 100 times the cosine between an image's and its prompt's CLIP embeddings (Hessel et al. 2021)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from deco_scale.errors import ConfigError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of CLIP's training images, as in its release."""


class ClipScorer:
    """A frozen CLIP from a local folder."""

    def __init__(self, model: Any, tokenizer: Any, mean: Sequence[float], std: Sequence[float]) -> None:
        self._model, self._tokenizer = model.eval().requires_grad_(False), tokenizer
        self._mean, self._std = np.array(mean, np.float32), np.array(std, np.float32)
        self._side = int(model.config.vision_config.image_size)
        self._max_tokens = int(model.config.text_config.max_position_embeddings)

    @classmethod
    def load(cls, folder: Path) -> "ClipScorer":
        """Load a ``transformers`` folder on the CPU, without network and from safetensors only.

        Raises :class:`ConfigError` if it is missing, damaged, or not a CLIP.
        """
        hint = (
            f"CLIP folder {folder}: expected config.json, model.safetensors and the tokenizer's files "
            "of a CLIP, such as openai/clip-vit-large-patch14"
        )
        if not folder.is_dir():
            raise ConfigError(f"{hint}; there is no such folder")
        from transformers import AutoTokenizer, CLIPModel

        try:
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
            if kind != "clip":
                raise ConfigError(f"{hint}; its config.json has model_type {kind}")
            mean, std = _normalisation(folder / "preprocessor_config.json")
            loaded: Any = CLIPModel.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            model, loading = loaded
            # transformers initialises missing weights at random and reads a missing vocabulary as an empty one.
            missing = sorted(loading["missing_keys"])[:2]
            if missing:
                raise ConfigError(f"{hint}; missing weights: {', '.join(missing)}")
            if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
                raise ConfigError(f"{hint}; it has neither tokenizer.json nor vocab.json")
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except ConfigError:
            raise
        except (
            OSError,
            ValueError,
            LookupError,
            AttributeError,
            TypeError,
            RuntimeError,
            SafetensorError,
        ) as error:
            raise ConfigError(
                f"{hint} ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
            ) from error
        return cls(model, tokenizer, mean, std)

    def to(self, device: torch.device) -> "ClipScorer":
        """Move the model; returns itself."""
        self._model.to(device)
        return self

    @torch.no_grad()
    def scores(self, images: Sequence[Any], prompts: Sequence[str]) -> Tensor:
        """Score (B,), on the CPU, of each uint8 image (Y, X, 3) with its prompt; long prompts are truncated."""
        device = next(self._model.parameters()).device
        text = self._tokenizer(
            list(prompts), return_tensors="pt", padding=True, truncation=True, max_length=self._max_tokens
        )
        pixels = torch.from_numpy(np.stack([self._preprocess(image) for image in images]))
        output = self._model(
            input_ids=text["input_ids"].to(device),
            attention_mask=text["attention_mask"].to(device),
            pixel_values=pixels.to(device),
        )
        # Both have unit norm.
        return 100 * (output.image_embeds * output.text_embeds).sum(dim=-1).float().cpu()

    def _preprocess(self, image_YXC: Any) -> Any:
        """(3, S, S): shorter side resized to S (bicubic), centre crop, normalised."""
        image = Image.fromarray(image_YXC)
        side, shorter = self._side, min(image.size)
        width, height = (int(side * length / shorter) for length in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - side) // 2, (height - side) // 2
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
        return ((pixels - self._mean) / self._std).transpose(2, 0, 1)


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation in a folder's preprocessor config, else the release's."""
    if not path.is_file():
        return MEAN, STD
    settings = json.loads(path.read_text(encoding="utf-8"))
    return settings.get("image_mean", MEAN), settings.get("image_std", STD)
