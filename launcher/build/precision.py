"""What of a run's model computes in FP8."""

from data_pipeline.stream.buckets import bucket_sizes
from deco_scale.config import RunConfig
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, plan_fp8
from deco_scale.precision.recipe import Fp8Choice


def plan_precision(cfg: RunConfig, tp: int, choice: Fp8Choice) -> Fp8Plan:
    """The linears that FP8 takes, judged by every shape that the stages will see."""
    patch = cfg.model.patch_size
    batches = [
        BatchShape(stage.micro_batch, (height // patch) * (width // patch), cfg.model.text_tokens)
        for stage in cfg.stages
        for height, width in bucket_sizes(stage.resolution, multiple=patch, max_aspect=cfg.data.bucket_aspect)
    ]
    return plan_fp8(
        cfg.model,
        cfg.precision,
        choice,
        tp=tp,
        batches=batches,
        recompute=cfg.parallel.activation_checkpointing,
        compile_blocks=cfg.compile,
    )
