"""An :class:`ImageGenerator` from a checkpoint: EMA weights and text encoder, on one device or a tp group.

This is where sampling meets configuration, checkpoints and parallelism.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from deco_scale.checkpoint.format import CheckpointMeta, find_checkpoint, read_meta, read_tensors
from deco_scale.config import RunConfig, build_config
from deco_scale.errors import ConfigError, as_config_error
from deco_scale.models import Denoiser
from deco_scale.models.encoders import load_text_encoder
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.parallel.parallelize import parallelize
from deco_scale.parallel.sequence_parallel import TokenShard, encode_shared
from deco_scale.parallel.tensor_parallel import apply_tensor_parallel, show_local_weights
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.sampling.cuda_graphs import CudaGraphedVelocity
from deco_scale.sampling.generate import EncodeFn, ImageGenerator
from deco_scale.sampling.images import PredictFn, velocity_of

Compute = Literal["fp32", "bf16"]
"""Precision of a generator; bf16 is autocast over fp32 weights."""


def build_generator(
    denoiser: Denoiser,
    cfg: RunConfig,
    meta: CheckpointMeta,
    *,
    text_encoder: str | None = None,
    compile: bool = False,
    cuda_graphs: bool = False,
    tp: DeviceMesh | None = None,
    compute: Compute | None = None,
) -> ImageGenerator:
    """A generator around the checkpoint's denoiser, on the denoiser's device.

    ``text_encoder`` replaces the configured folder; ``compute`` defaults to :func:`sampling_compute`. ``compile``
    compiles the transformer blocks, ``cuda_graphs`` replays the model as graphs. The ranks of a one-dimensional
    mesh ``tp`` share the model and generate the same images together.

    Raises :class:`ConfigError` for an encoder that is missing, damaged or does not fit, and for settings that
    exclude each other.
    """
    device = next(denoiser.parameters()).device
    if tp is not None and cuda_graphs:
        raise ConfigError(
            "CUDA graphs need the full model on each GPU: use either CUDA graphs or tensor parallelism"
        )
    precision = PrecisionConfig(compute=compute or sampling_compute(cfg, device))
    predict, shard = _predictor(denoiser, precision, device, compile=compile, tp=tp)
    velocity = velocity_of(
        predict, cfg.model.patch_size, prediction=cfg.objective.prediction, t_eps=cfg.objective.t_eps
    )
    if cuda_graphs:
        with as_config_error():
            velocity = CudaGraphedVelocity(velocity, device)
    encode, null = _conditions(cfg, text_encoder, device, shard)
    return ImageGenerator(
        velocity, cfg.model, encode=encode, null=null, device=device, digest=meta.parameter_digest, step=meta.step
    )


def sampling_compute(cfg: RunConfig, device: torch.device) -> Compute:
    """A GPU computes in the run's precision (``fp8`` as ``bf16``), a CPU in fp32."""
    return "bf16" if device.type == "cuda" and cfg.precision.compute != "fp32" else "fp32"


def read_checkpoint(checkpoint: Path) -> tuple[Path, RunConfig, CheckpointMeta]:
    """Step folder, configuration and metadata of a checkpoint, or of the newest complete one of a run's folder."""
    path = find_checkpoint(checkpoint)
    if path is None:
        raise ConfigError(f"{checkpoint}: neither a complete checkpoint nor a run with one")
    meta = read_meta(path)
    return path, build_config(meta.config, source=str(path / "meta.json")), meta


def load_denoiser(cfg: RunConfig, path: Path, device: torch.device) -> Denoiser:
    """Plain denoiser with a checkpoint's EMA weights, ready for inference."""
    with torch.device("meta"):
        denoiser = Denoiser(cfg.model)
    tensors = read_tensors(path, "ema.denoiser.")
    try:
        denoiser.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError(f"{path} does not fit its own configuration: {error}") from error
    return denoiser.eval().requires_grad_(False).to(device)


def _predictor(
    denoiser: Denoiser, precision: PrecisionConfig, device: torch.device, *, compile: bool, tp: DeviceMesh | None
) -> tuple[PredictFn, TokenShard | None]:
    """The denoiser's full prediction on every rank, and the tp group if there is one."""
    objective = Objective(denoiser, ObjectiveConfig(repa_weight=0.0), encoder_dim=0)
    shard = parallelize(
        objective,
        tensor_parallel=partial(apply_tensor_parallel, mesh=tp) if tp is not None else None,
        show_local_weights=show_local_weights if tp is not None else None,
        compiled=denoiser.transformer_blocks if compile else (),
    )

    def predict(patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        with autocast(precision, device):
            prediction = objective.predict(patches, t, condition, grid)
        return prediction if shard is None else shard.gather(prediction, patches.shape[1])

    return predict, shard


def _conditions(
    cfg: RunConfig, text_encoder: str | None, device: torch.device, shard: TokenShard | None
) -> tuple[EncodeFn | None, Tensor]:
    """Text encoder (shared by a tp group) and null condition."""
    if cfg.model.kind != "t2i_deco":
        if text_encoder is not None:
            raise ConfigError(f"a {cfg.model.kind} model takes classes and no text encoder")
        return None, torch.tensor(cfg.model.num_classes)
    assert cfg.text_encoder is not None
    settings = dataclasses.replace(cfg.text_encoder, path=text_encoder or cfg.text_encoder.path)
    text = load_text_encoder(settings, cfg.model.text_dim, device)
    return text.encode if shard is None else partial(encode_shared, text.encode, shard=shard), text.null
