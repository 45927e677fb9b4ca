"""The plain objective of a configuration, and what fits it: kernels, attention and FP8 linears."""

from collections.abc import Callable, Sequence

import torch

from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import run_on_rank_zero
from deco_scale.errors import ConfigError
from deco_scale.kernels.select import Kernels, use_kernels
from deco_scale.models import Denoiser
from deco_scale.models.attention.autotune import BackendChoice, choose_backend, model_shapes, table_of
from deco_scale.models.attention.dispatch import AttentionSetting
from deco_scale.models.layers import Attention
from deco_scale.objectives import Objective
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, plan_fp8
from deco_scale.precision.recipe import choose_fp8


def compute_dtype(cfg: RunConfig) -> torch.dtype:
    """What the model's matrix products take where they are not FP8."""
    return torch.float32 if cfg.precision.compute == "fp32" else torch.bfloat16


def choose_attention(
    cfg: RunConfig, tp: int, device: torch.device
) -> tuple[AttentionSetting, Sequence[BackendChoice]]:
    """The named backend; for ``auto`` on a GPU the kernels that rank 0 measured, the same on every rank."""
    if cfg.attention.backend != "auto" or device.type != "cuda":
        return cfg.attention.backend, []

    def measure() -> list[BackendChoice]:
        try:
            shapes = dict.fromkeys(
                shape
                for stage in cfg.stages
                for shape in model_shapes(cfg.model, resolution=stage.resolution, batch=stage.micro_batch, tp=tp)
            )
            return [
                choose_backend(shape, device=device, dtype=compute_dtype(cfg), compiled=cfg.compile is not False)
                for shape in shapes
            ]
        except ValueError as error:
            raise ConfigError(str(error)) from error

    choices = run_on_rank_zero(measure)
    return table_of(choices), choices


def objective_builder(
    cfg: RunConfig, encoder_dim: int, kernels: Kernels, attention: AttentionSetting
) -> Callable[[], Objective]:
    """A function that builds the plain objective on whatever device is current."""

    def build() -> Objective:
        denoiser = Denoiser(cfg.model)
        for module in denoiser.modules():
            if isinstance(module, Attention):
                module.backend = attention
        objective = Objective(denoiser, cfg.objective, encoder_dim=encoder_dim)
        use_kernels(objective, kernels)
        return objective

    return build


def plan_fp8_linears(cfg: RunConfig, tp: int, device: torch.device) -> Fp8Plan | None:
    """The linears that compute in FP8, by every shape that the stages will see; None but for ``compute: fp8``.

    Raises :class:`ConfigError` where the machine cannot.
    """
    if cfg.precision.compute != "fp8":
        return None
    return plan_fp8(
        cfg.model,
        cfg.precision,
        choose_fp8(cfg.precision, device),
        tp=tp,
        batches=[BatchShape(*shape) for shape in cfg.batch_shapes()],
        recompute=cfg.parallel.activation_checkpointing,
        compile_blocks=cfg.compile,
    )
