"""CLIP score: 100 times the cosine between an image's and its prompt's CLIP embeddings (Hessel et al. 2021)."""

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from deco_scale.errors import ConfigError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Pixel statistics of CLIP's training images, as in its release."""


class ClipScorer:
    """A frozen CLIP from a local folder."""

    def __init__(self, folder: Path) -> None:
        """Load a ``transformers`` folder on the CPU, without network and from safetensors only.

        Raises :class:`ConfigError` if it is missing, damaged, or not a CLIP.
        """
        try:
            self._load(folder)
        except Exception as error:  # transformers raises many kinds for damaged files
            reason = textwrap.shorten(str(error) or type(error).__name__, 240)
            raise ConfigError(
                f"CLIP folder {folder}: expected config.json, model.safetensors and the tokenizer's files "
                f"of a CLIP, such as openai/clip-vit-large-patch14 ({reason})"
            ) from error

    def _load(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"its config.json has model_type {kind}")
        loaded: Any = CLIPModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        self._model, loading = loaded
        # transformers initialises missing weights at random and reads a missing vocabulary as an empty one.
        if loading["missing_keys"]:
            raise ValueError(f"missing weights: {', '.join(sorted(loading['missing_keys'])[:2])}")
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError("it has neither tokenizer.json nor vocab.json")
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        settings: dict[str, Any] = {}
        if (folder / "preprocessor_config.json").is_file():
            settings = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        self._mean = np.array(settings.get("image_mean", MEAN), np.float32)
        self._std = np.array(settings.get("image_std", STD), np.float32)
        self._model.eval().requires_grad_(False)
        self._side = int(self._model.config.vision_config.image_size)
        self._max_tokens = int(self._model.config.text_config.max_position_embeddings)

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
