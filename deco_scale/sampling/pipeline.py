"""Images from a folder of ``deco-ckpt export --format diffusers``.

It has the layout of diffusers: ``model_index.json``, ``transformer/`` (settings and safetensors) and
``scheduler/`` (sampler settings). Only JSON and safetensors are read.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import TextEncoderConfig
from deco_scale.models.encoders import load_text_encoder
from deco_scale.objectives.config import Prediction
from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.generate import EncodeFn, ImageGenerator, SampleRequest
from deco_scale.sampling.images import velocity_of

_WEIGHTS = "diffusion_pytorch_model"


class PipelineError(ValueError):
    """The folder is not a pipeline, or a call does not fit its model; says what to do."""


class DecoPipeline:
    """A denoiser with its sampler, and for text models a text encoder: prompts or classes in, images out."""

    def __init__(
        self, denoiser: Denoiser, generator: ImageGenerator, sampler: SamplerConfig, resolution: int
    ) -> None:
        self.denoiser, self.sampler, self.resolution = denoiser, sampler, resolution
        self._generator = generator

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        text_encoder: str | Path | EncodeFn | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "DecoPipeline":
        """Load an exported folder.

        ``text_encoder`` is a ``transformers`` folder or hub id, or a function from captions to text embeddings;
        by default the path that the folder names is used. ``dtype`` converts the weights (default: as stored).
        Raises :class:`PipelineError` naming file or tensor, :class:`ConfigError` for a missing text encoder.
        """
        folder, device = Path(folder), torch.device(device)
        index = _read_json(folder / "model_index.json")
        if index.get("_class_name") != "DecoPipeline":
            raise PipelineError(f"{folder} is a {index.get('_class_name')}, not a DecoPipeline")
        settings = _read_json(folder / "transformer" / "config.json")
        scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
        scheduler.pop("_class_name", None)
        try:
            model = ModelConfig(**settings["model"])
            sampler = SamplerConfig(**scheduler)
            resolution = int(index["resolution"])
            prediction, t_eps = settings.get("prediction", "velocity"), float(settings.get("t_eps", 0.05))
            if prediction not in get_args(Prediction) or not 0 < t_eps <= 1:
                raise ValueError(f"prediction={prediction!r} with t_eps={t_eps}")
        except (KeyError, TypeError, ValueError) as error:
            raise PipelineError(f"{folder}: damaged settings: {error}") from error
        with torch.device("meta"):
            denoiser = Denoiser(model)
        try:
            denoiser.load_state_dict(_weights(folder / "transformer"), strict=True, assign=True)
        except RuntimeError as error:
            raise PipelineError(f"{folder / 'transformer'}: the weights do not fit its config: {error}") from error
        denoiser = denoiser.to(device, dtype).eval().requires_grad_(False)
        weight_dtype = denoiser.patch_embed.weight.dtype

        def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
            if condition.is_floating_point():
                condition = condition.to(weight_dtype)
            return denoiser(patches.to(weight_dtype), t, condition, grid=grid).prediction_BNK

        encode, null = None, torch.tensor(model.num_classes)
        if model.kind == "t2i_deco":
            encode = _encoder(text_encoder, index.get("text_encoder"), model, device)
            null = encode([""])[0]
        elif text_encoder is not None:
            raise PipelineError(f"a {model.kind} model takes classes, not a text_encoder")
        velocity = velocity_of(predict, model.patch_size, prediction=prediction, t_eps=t_eps)
        generator = ImageGenerator(velocity, model, encode=encode, null=null, device=device)
        return cls(denoiser, generator, sampler, resolution)

    def __call__(
        self,
        conditions: Sequence[str] | Sequence[int],
        *,
        seeds: Sequence[int] | None = None,
        size: tuple[int, int] | None = None,
        batch: int = 8,
        sampler: SamplerConfig | None = None,
    ) -> Any:
        """Images ``(P, Y, X, 3)`` in uint8, one per prompt (text models) or class number (class models).

        ``seeds`` are one per image (default: 0, 1, ...); ``size`` is (height, width) in pixels. Raises
        :class:`PipelineError` for conditions of the wrong kind, counts that differ, or an impossible size.
        """
        if not conditions:
            raise PipelineError("no prompt or class given")
        seeds = range(len(conditions)) if seeds is None else seeds
        if len(seeds) != len(conditions):
            raise PipelineError(f"{len(conditions)} conditions with {len(seeds)} seeds")
        items: Sequence[str | int] = conditions
        requests = [SampleRequest(item, seed=seed) for item, seed in zip(items, seeds, strict=True)]
        size = size or (self.resolution, self.resolution)
        try:
            images = self._generator.images(requests, size=size, sampler=sampler or self.sampler, batch=batch)
        except ValueError as error:
            raise PipelineError(str(error)) from error
        return np.stack([pixels for _, pixels in images])


def _encoder(
    given: str | Path | EncodeFn | None, stored: Any, model: ModelConfig, device: torch.device
) -> EncodeFn:
    """The given function or folder, or else the stored folder; embeddings are checked for the model's shape."""
    if callable(given):
        function = given
    else:
        try:
            settings = TextEncoderConfig(**(stored or {"path": "", "max_tokens": model.text_tokens}))
        except (TypeError, ValueError) as error:
            raise PipelineError(f"model_index.json: its text_encoder is damaged: {error}") from error
        if not given and not settings.path:
            raise PipelineError("the folder names no text encoder: give text_encoder=, a folder or a function")
        settings = dataclasses.replace(settings, path=str(given or settings.path))
        function = load_text_encoder(settings, model.text_dim, device).encode

    def encode(texts: Sequence[str]) -> Tensor:
        embeddings = function(texts)
        actual, expected = tuple(embeddings.shape), (len(texts), model.text_tokens, model.text_dim)
        if actual != expected:
            raise PipelineError(f"text embeddings have shape {actual}, the model needs {expected}")
        return embeddings

    return encode


def _weights(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    names = [f"{_WEIGHTS}.safetensors"]
    if index.is_file():
        table = _read_json(index).get("weight_map")
        if not isinstance(table, dict) or any(not isinstance(n, str) or "/" in n for n in table.values()):
            raise PipelineError(f"{index} has no table from tensors to files beside it")
        names = sorted(set(table.values()))
    state: dict[str, Tensor] = {}
    for name in names:
        try:
            state.update(load_file(folder / name))
        except (OSError, SafetensorError) as error:
            raise PipelineError(f"{folder / name} is damaged or missing: {error}") from error
    return state


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PipelineError(f"{path} is damaged or missing: {error}") from error
    if not isinstance(content, dict):
        raise PipelineError(f"{path} does not contain a JSON object")
    return content
