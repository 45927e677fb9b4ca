"""The configured engine around a plain objective."""

from collections.abc import Callable

import torch

from deco_scale.config import RunConfig
from deco_scale.kernels.select import choose_kernels
from deco_scale.objectives import Objective
from deco_scale.parallel.engines.base import Engine, EngineSettings
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.fp8_plan import Fp8Plan
from launcher.build.model import choose_compile


def build_engine(
    cfg: RunConfig,
    dims: ParallelDims,
    device: torch.device,
    build: Callable[[], Objective],
    fp8_plan: Fp8Plan | None = None,
) -> Engine:
    """The configured engine around a freshly initialised objective; ``fp8_plan`` goes with ``compute: fp8``."""
    settings = EngineSettings(
        dims=dims,
        device=device,
        optimizer=cfg.optimizer,
        precision=cfg.precision,
        seed=cfg.run.seed,
        compile_blocks=choose_compile(cfg, device)[0],
        compile_fallback=cfg.compile == "auto",
        activation_checkpointing=cfg.parallel.activation_checkpointing,
        fp8_plan=fp8_plan,
        kernels=choose_kernels(cfg.kernels, device),
        zero_stage=cfg.parallel.zero_stage,
        micro_batch=cfg.stages[0].micro_batch,
        overrides=cfg.parallel.deepspeed,
    )
    if cfg.parallel.engine == "deepspeed":
        from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(build, settings)
    from deco_scale.parallel.engines.fsdp import FsdpEngine

    return FsdpEngine(build, settings)
