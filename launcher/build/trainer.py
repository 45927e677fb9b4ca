"""Builds a :class:`Trainer` from a configuration: model, data, engine and callbacks."""

import dataclasses
import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.stream.loader import Loader
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError
from deco_scale.kernels.select import choose_kernels
from deco_scale.models.attention.dispatch import check_backend
from deco_scale.models.encoders import TextEncoder, text_identity
from deco_scale.models.tp_plan import check_tp
from deco_scale.observability.run_logger import RunLogger, logged_to
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps, resolve_parallel_dims
from deco_scale.planning.flops import peak_flops, training_flops
from deco_scale.sampling import ImageGenerator
from deco_scale.sampling.images import velocity_of
from deco_scale.training.callbacks import Callback
from deco_scale.training.inputs import InputBuilder, padded_text_embeddings
from deco_scale.training.metrics import RankComputeTimer
from deco_scale.training.prefetch import EncoderPrefetcher
from deco_scale.training.trainer import Heartbeat, Stage, Trainer
from launcher.build.callbacks import CheckReplicas, Evaluate, LogRun, SampleImages, SaveConfig
from launcher.build.data import data_opener, load_encoders, shared_over_tp, synthetic_opener
from launcher.build.engine import build_engine
from launcher.build.model import choose_attention, compute_dtype, objective_builder, plan_fp8_linears

logger = logging.getLogger(__name__)


def build_trainer(
    cfg: RunConfig,
    env: Environment,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    stop: StopRequest | None = None,
    start_watchdog: Callable[[], Heartbeat],
) -> tuple[Trainer, RunLogger]:
    """Check what can be checked, join the other ranks, build everything; close the :class:`RunLogger` at the end.

    ``start_watchdog`` is called on all ranks once they have joined. Errors that have a name are shared by all.
    """
    dims, device = check(cfg, env)
    folder = Path(cfg.run.dir)
    checkpoints = CheckpointManager(folder / "checkpoints", cfg.checkpoint)
    if resume != "auto":
        checkpoints.resolve(resume)
    torch.set_float32_matmul_precision("high" if cfg.precision.compute != "fp32" else "highest")
    init_distributed(env, device)
    heartbeat = start_watchdog()
    raise_together(lambda: _prepare_folder(folder, checkpoints) if dist.get_rank() == 0 else None)
    precomputed = cfg.data.has_text_embeddings and not dry_run
    open_data: Callable[..., Any] = synthetic_opener(dims)
    null_embedding = None
    if not dry_run:
        open_data = data_opener(
            cfg.data,
            dims,
            patch_size=cfg.model.patch_size,
            seed=cfg.run.seed,
            quarantine=folder / "quarantine.jsonl",
            text_identity=raise_together(lambda: _text_identity(cfg)) if precomputed else None,
        )
        # Fail on bad data before minutes are spent on encoders and engines. Warnings come again, to the run's log.
        with logged_to(logging.NullHandler()):
            first: Loader = open_data(cfg.stages[0], 0)
        null_embedding = first.null_text_embedding
        first.close()
    need_text = not precomputed or cfg.samples.every > 0 or cfg.evaluation.every > 0
    text, image = raise_together(lambda: load_encoders(cfg, device, need_text=need_text))
    kernels = choose_kernels(cfg.kernels, device)
    attention, choices = choose_attention(cfg, dims.tp, device)
    fp8_plan = raise_together(lambda: plan_fp8_linears(cfg, dims.tp, device))
    build = objective_builder(cfg, image.width if image is not None else 0, kernels, attention)
    engine = build_engine(cfg, dims, device, build, fp8_plan)
    stages = derive_stages(cfg, dims)
    plain = json.loads(json.dumps(dataclasses.asdict(cfg)))
    run_logger = RunLogger(
        folder,
        active=dist.get_rank() == 0,
        total_steps=sum(stage.cfg.steps for stage in stages),
        wandb=cfg.wandb,
        monitor=cfg.monitor,
        config=plain,
    )
    for line in (*(choice.line() for choice in choices), *(fp8_plan.messages() if fp8_plan else ())):
        logger.info(line)
    encode_text = None
    if null_embedding is not None:
        shape = (cfg.model.text_tokens, cfg.model.text_dim)
        null = padded_text_embeddings([null_embedding], shape)[0].to(device)
    elif text is not None:
        null, encode_text = text.null, shared_over_tp(text.encode, engine)
    else:
        null = torch.tensor(cfg.model.num_classes, device=device)
    build_inputs = InputBuilder(
        seed=cfg.run.seed,
        device=device,
        objective=cfg.objective,
        null=null,
        num_classes=cfg.model.num_classes,
        encode_text=encode_text,
        encode_image=shared_over_tp(image.encode, engine) if image else None,
    )
    hosts = gather_objects(socket.gethostname())
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    try:
        callbacks = _callbacks(cfg, dims, engine, text, device, run_logger, hosts)
    except BaseException:
        run_logger.close()
        raise
    trainer = Trainer(
        settings=cfg.run,
        stages=stages,
        engine=engine,
        build_inputs=build_inputs,
        open_data=open_data,
        checkpoints=checkpoints,
        device=device,
        config=plain,
        peak_flops=peak * dist.get_world_size() if peak else None,
        callbacks=callbacks,
        encoder_prefetcher=_encoder_prefetcher(cfg, build_inputs, device),
        stop=stop,
        faults=cfg.faults,
        heartbeat=heartbeat,
        hosts=hosts,
        rank_compute=RankComputeTimer(engine.blocks, device, whole_blocks=cfg.compile),
    )
    return trainer, run_logger


def check(cfg: RunConfig, env: Environment) -> tuple[ParallelDims, torch.device]:
    """Checks everything that can be checked without other ranks; raises :class:`ConfigError`."""
    dims = resolve_parallel_dims(cfg.parallel, env.world_size)
    check_tp(cfg.model, dims.tp)
    derive_stages(cfg, dims)
    device = choose_device(cfg.device, env.local_rank)
    try:
        check_backend(cfg.attention.backend, device, dtype=compute_dtype(cfg), head_dim=cfg.model.head_dim)
        choose_kernels(cfg.kernels, device)
        plan_fp8_linears(cfg, dims.tp, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dims, device


def derive_stages(cfg: RunConfig, dims: ParallelDims) -> list[Stage]:
    """Stages with accumulation and FLOPs; raises :class:`ConfigError` for impossible batches."""
    return [
        Stage(
            cfg=stage,
            accumulation=accumulation_steps(
                global_batch=stage.global_batch,
                micro_batch=stage.micro_batch,
                dp=dims.dp,
                where=f"stages.{stage.name}",
            ),
            image_flops=training_flops(cfg.model, stage.resolution, stage.resolution),
        )
        for stage in cfg.stages
    ]


def _callbacks(
    cfg: RunConfig,
    dims: ParallelDims,
    engine: Engine,
    text: TextEncoder | None,
    device: torch.device,
    run_logger: RunLogger,
    hosts: list[str],
) -> list[Callback]:
    folder = Path(cfg.run.dir)

    def generator_at(step: int) -> ImageGenerator:
        velocity = velocity_of(
            engine.predict, cfg.model.patch_size, prediction=cfg.objective.prediction, t_eps=cfg.objective.t_eps
        )
        return ImageGenerator(
            velocity,
            cfg.model,
            encode=text.encode if text is not None else None,
            null=text.null if text is not None else torch.tensor(cfg.model.num_classes),
            device=device,
            step=step,
        )

    def resolution_at(step: int) -> int:
        """Of the stage that step ``step`` (counted from 1) belongs to."""
        end = 0
        for stage in cfg.stages:
            end += stage.steps
            if step <= end:
                break
        return stage.resolution

    drawing: dict[str, Any] = {
        "generator_at": generator_at,
        "resolution_at": resolution_at,
        "dims": dims,
        "run_logger": run_logger,
    }
    attempt = {
        "world_size": dist.get_world_size(),
        "layout": dataclasses.asdict(dims),
        "hosts": sorted(set(hosts)),
    }
    return [
        LogRun(run_logger, attempt),
        SaveConfig(cfg),
        CheckReplicas(cfg.faults.check_replicas_every, hosts),
        SampleImages(cfg.samples, folder=folder / "samples", **drawing),
        Evaluate(
            cfg.evaluation,
            num_classes=0 if cfg.model.kind == "t2i_deco" else cfg.model.num_classes,
            folder=folder / "evaluation",
            device=device,
            **drawing,
        ),
    ]


def _encoder_prefetcher(
    cfg: RunConfig, build_inputs: InputBuilder, device: torch.device
) -> EncoderPrefetcher | None:
    text = build_inputs.encode_text is not None and cfg.text_encoder is not None and cfg.text_encoder.ahead
    image = build_inputs.encode_image is not None and cfg.image_encoder is not None and cfg.image_encoder.ahead
    if not text and not image:
        return None
    return EncoderPrefetcher(lambda micro: build_inputs.encode(micro, text=text, image=image), device)


def _text_identity(cfg: RunConfig) -> dict[str, Any]:
    assert cfg.text_encoder is not None
    return text_identity(cfg.text_encoder, cfg.model.text_dim)


def _prepare_folder(folder: Path, checkpoints: CheckpointManager) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={folder}: {error.strerror}") from error
    checkpoints.prepare()
