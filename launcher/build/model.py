"""The plain objective of a configuration, and what fits it: kernels, attention and FP8 linears."""

import importlib.util
from collections.abc import Callable, Sequence

import torch

from data_pipeline.stream.buckets import bucket_sizes
from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import run_on_rank_zero
from deco_scale.errors import ConfigError
from deco_scale.kernels.select import Kernels, use_kernels
from deco_scale.models import Denoiser
from deco_scale.models.attention.autotune import BackendChoice, choose_backend, model_shapes, table_of
from deco_scale.models.attention.backends import graph_break
from deco_scale.models.attention.dispatch import AttentionSetting
from deco_scale.models.layers import Attention
from deco_scale.objectives import Objective
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, compile_conflict, plan_fp8
from deco_scale.precision.recipe import choose_fp8

COMPILED_SHAPES = 16
"""Largest number of a stage's image shapes for which ``compile: auto`` compiles."""


def compute_dtype(cfg: RunConfig) -> torch.dtype:
    """What the model's matrix products take where they are not FP8."""
    return torch.float32 if cfg.precision.compute == "fp32" else torch.bfloat16


def choose_attention(
    cfg: RunConfig, tp: int, device: torch.device
) -> tuple[AttentionSetting, Sequence[BackendChoice]]:
    """The named backend; for ``auto`` on a GPU the kernels that rank 0 measured, the same on every rank."""
    if cfg.attention.backend != "auto" or device.type != "cuda":
        return cfg.attention.backend, []

    compiled, _ = choose_compile(cfg, device)

    def measure() -> list[BackendChoice]:
        try:
            shapes = dict.fromkeys(
                shape
                for stage in cfg.stages
                for shape in model_shapes(cfg.model, resolution=stage.resolution, batch=stage.micro_batch, tp=tp)
            )
            return [
                choose_backend(shape, device=device, dtype=compute_dtype(cfg), compiled=compiled)
                for shape in shapes
            ]
        except ValueError as error:
            raise ConfigError(str(error)) from error

    choices = run_on_rank_zero(measure)
    return table_of(choices), choices


def choose_compile(cfg: RunConfig, device: torch.device) -> tuple[bool, str]:
    """Whether transformer blocks and decoder are compiled, and for ``auto`` why not (empty: they are)."""
    if cfg.compile != "auto":
        return cfg.compile, ""
    reason = _compile_problem(cfg, device)
    return not reason, reason


def check_compile(cfg: RunConfig) -> None:
    """Raises :class:`ConfigError` for ``compile: true`` with a named attention kernel that breaks graphs."""
    if cfg.compile is True and (reason := graph_break(cfg.attention.backend)):
        raise ConfigError(
            f"compile=true does not work with attention.backend={cfg.attention.backend}: {reason}; "
            "possible: compile=false, or attention.backend=auto, flash, cudnn or sdpa"
        )


def _compile_problem(cfg: RunConfig, device: torch.device) -> str:
    if device.type != "cuda":
        return "generating C++ for a CPU takes minutes; compile=true does it nevertheless"
    if importlib.util.find_spec("triton") is None:
        return "graphs need the package triton, which CUDA builds of PyTorch bring along"
    most, multiple = cfg.data.bucket_aspect, cfg.model.patch_size
    shapes = max(len(bucket_sizes(s.resolution, multiple=multiple, max_aspect=most)) for s in cfg.stages)
    if shapes > COMPILED_SHAPES:
        return f"data.bucket_aspect gives {shapes} shapes, each with graphs of its own (at most {COMPILED_SHAPES})"
    if reason := graph_break(cfg.attention.backend):
        return f"attention.backend={cfg.attention.backend}: {reason}"
    if cfg.precision.compute == "fp8":
        choice = choose_fp8(cfg.precision, device)
        return compile_conflict(choice, cfg.parallel.activation_checkpointing) or ""
    return ""


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
        compile_blocks=choose_compile(cfg, device)[0],
    )
