"""The configured engine around a plain objective."""

import logging
from collections.abc import Callable

import torch

from deco_scale.cli.workload import workload
from deco_scale.config import RunConfig
from deco_scale.distributed.collectives import run_on_rank_zero
from deco_scale.kernels.select import choose_kernels
from deco_scale.objectives import Objective
from deco_scale.parallel.engines.base import Engine, EngineSettings
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.planning.forecast import keeps_weights
from deco_scale.planning.hardware import MARGIN
from deco_scale.precision.fp8_plan import Fp8Plan
from launcher.build.model import choose_compile

logger = logging.getLogger(__name__)


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
        reshard_after_forward=_reshards(cfg, dims, device),
        reduce_dtype=cfg.parallel.reduce_dtype,
        zero_stage=cfg.parallel.zero_stage,
        micro_batch=cfg.stages[0].micro_batch,
        overrides=cfg.parallel.deepspeed,
    )
    if cfg.parallel.engine == "deepspeed":
        from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(build, settings)
    from deco_scale.parallel.engines.fsdp import FsdpEngine

    return FsdpEngine(build, settings)


def _reshards(cfg: RunConfig, dims: ParallelDims, device: torch.device) -> bool:
    """The setting; for ``auto`` whether gathered weights do not fit beside everything else, in any stage."""
    setting = cfg.parallel.reshard_after_forward
    if setting != "auto":
        return setting

    def fits(needed: float) -> bool:
        if device.type != "cuda":
            return True
        return needed <= (1 - MARGIN) * torch.cuda.get_device_properties(device).total_memory

    def keeps() -> bool:
        stages = [stage.fitted(dims.dp) for stage in cfg.stages]
        return keeps_weights(workload(cfg)[0], stages, cfg.parallel, dims, kind=device.type, fits=fits)

    # One answer for all ranks, whose GPUs may differ.
    kept = run_on_rank_zero(keeps)
    logger.info(
        "parallel.reshard_after_forward=auto: gathered weights %s",
        "stay from forward to the update" if kept else "are released after use, as memory is short",
    )
    return not kept
