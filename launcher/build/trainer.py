"""Builds a :class:`Trainer` from a configuration: model, data, engine and callbacks."""

import dataclasses
import itertools
import json
import logging
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.stream.loader import Loader
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed
from deco_scale.distributed.collectives import gather_objects, raise_together
from deco_scale.distributed.cpu_binding import bind_cpus, should_bind
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError
from deco_scale.evaluation.in_training import EvaluationImage, generate_share
from deco_scale.kernels.select import choose_kernels
from deco_scale.models.attention.dispatch import check_backend
from deco_scale.models.config import is_on
from deco_scale.models.encoders import TextEncoder, text_identity
from deco_scale.models.tp_plan import check_tp
from deco_scale.observability.run_logger import RunLogger, logged_to
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.planning.flops import training_flops
from deco_scale.planning.hardware import peak_flops
from deco_scale.sampling import ImageGenerator, SampleRequest
from deco_scale.sampling.config import SamplerConfig
from deco_scale.sampling.images import velocity_of
from deco_scale.training.callbacks import Callback
from deco_scale.training.inputs import InputBuilder, packed_text_embeddings
from deco_scale.training.metrics import RankComputeTimer
from deco_scale.training.prefetch import EncoderPrefetcher
from deco_scale.training.profiling import ProfileSteps
from deco_scale.training.trainer import Stage, Trainer
from deco_scale.watchdog.client import Watchdog
from launcher.build.callbacks import CheckReplicas, CollectGarbage, Evaluate, LogRun, SampleImages, SaveConfig
from launcher.build.data import SyntheticData, load_encoders, open_loader, shared_over_tp
from launcher.build.engine import build_engine
from launcher.build.model import (
    check_compile,
    choose_attention,
    choose_compile,
    compute_dtype,
    objective_builder,
    plan_fp8_linears,
)

logger = logging.getLogger(__name__)


def build_trainer(
    cfg: RunConfig,
    env: Environment,
    *,
    resume: str = "auto",
    dry_run: bool = False,
    stop: StopRequest | None = None,
    start_watchdog: Callable[[], Watchdog],
) -> tuple[Trainer, RunLogger]:
    """Check what can be checked, join the other ranks, build everything; close the :class:`RunLogger` at the end.

    ``start_watchdog`` is called on all ranks once they have joined. Errors that have a name are shared by all.
    """
    dims, device = check(cfg, env)
    configured, cfg = cfg, fit_stages(cfg, dims)
    folder = Path(cfg.run.dir)
    checkpoints = CheckpointManager(folder / "checkpoints", cfg.checkpoint)
    if resume != "auto":
        checkpoints.resolve(resume)
    torch.set_float32_matmul_precision("high" if cfg.precision.compute != "fp32" else "highest")
    init_distributed(env, device)
    # Before anything starts threads or processes that should inherit it: the sidecar, data workers, encoders.
    bound = bind_cpus(device) if should_bind(cfg.run.cpu_binding, os.environ) else []
    heartbeat = start_watchdog()
    raise_together(lambda: _prepare_folder(folder, checkpoints) if dist.get_rank() == 0 else None)
    precomputed = cfg.data.has_text_embeddings and not dry_run
    open_data: Callable[..., Any] = partial(SyntheticData, dims)
    null_embedding = None
    if not dry_run:
        encoder = cfg.text_encoder if precomputed else None
        identity = raise_together(lambda: text_identity(encoder, cfg.model.text_dim) if encoder else None)
        open_data = partial(open_loader, cfg, dims, identity)
        # Fail on bad data before minutes are spent on encoders and engines. Warnings come again, to the run's log.
        with logged_to(logging.NullHandler()):
            first: Loader = open_data(cfg.stages[0], 0)
        null_embedding = first.null_text_embedding
        first.close()
    need_text = not precomputed or cfg.samples.every > 0 or cfg.evaluation.every > 0
    text, image = raise_together(lambda: load_encoders(cfg, device, need_text=need_text))
    attention, choices = choose_attention(cfg, dims.tp, device)
    fp8_plan = raise_together(lambda: plan_fp8_linears(cfg, dims.tp, device))
    encoder_dim = image.width if image is not None else 0
    build = objective_builder(cfg, encoder_dim, choose_kernels(cfg.kernels, device), attention)
    engine = build_engine(cfg, dims, device, build, fp8_plan)
    stages = derive_stages(cfg, dims)
    plain = json.loads(json.dumps(dataclasses.asdict(configured)))
    run_logger = RunLogger(
        folder,
        active=dist.get_rank() == 0,
        total_steps=sum(stage.cfg.steps for stage in stages),
        wandb=cfg.wandb,
        monitor=cfg.monitor,
        config=plain,
    )
    for line in (*bound, *(choice.line() for choice in choices), *(fp8_plan.messages() if fp8_plan else ())):
        logger.info(line)
    for before, after in zip(configured.stages, cfg.stages, strict=True):
        if after.micro_batch < before.micro_batch:
            told = "stage %s: micro-batches of %d samples, not %d, fit a rank's share of global_batch=%d"
            logger.info(told, after.name, after.micro_batch, before.micro_batch, after.global_batch)
    if reason := choose_compile(cfg, device)[1]:
        logger.info("compile=auto: blocks run uncompiled: %s", reason)
    encoder_tokens = engine.tokens.with_own_communicator() if engine.tokens is not None else None
    encode_text = None
    if null_embedding is not None:
        shape = (cfg.model.text_tokens, cfg.model.text_dim)
        null = packed_text_embeddings([null_embedding], shape)[0].to(device).float()
    elif text is not None:
        null, encode_text = text.null, shared_over_tp(text.encode, encoder_tokens)
    else:
        null = torch.tensor(cfg.model.num_classes, device=device)
    build_inputs = InputBuilder(
        seed=cfg.run.seed,
        device=device,
        objective=cfg.objective,
        null=null,
        num_classes=cfg.model.num_classes,
        encode_text=encode_text,
        encode_image=shared_over_tp(image.encode, encoder_tokens) if image else None,
    )
    encoders = (build_inputs.encode_text, cfg.text_encoder), (build_inputs.encode_image, cfg.image_encoder)
    text_ahead, image_ahead = (
        bool(encode and settings and is_on(settings.ahead, device.type)) for encode, settings in encoders
    )
    prefetcher = None
    if text_ahead or image_ahead:
        encode = partial(build_inputs.encode, text=text_ahead, image=image_ahead)
        prefetcher = EncoderPrefetcher(encode, device)
    hosts = gather_objects(socket.gethostname())
    nodes = len(set(hosts))
    if cfg.parallel.engine == "fsdp" and nodes > 1 and dims.dp_shard * dims.tp > len(hosts) // nodes:
        logger.info(
            "parallel.dp_shard=%d gathers weights between nodes; parallel.dp_replicate=%d gathers inside of a "
            "node (HSDP), if a node's GPUs hold the state",
            dims.dp_shard,
            nodes,
        )
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    try:
        callbacks = _callbacks(configured, dims, engine, text, device, run_logger, hosts)
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
        encoder_prefetcher=prefetcher,
        stop=stop,
        faults=cfg.faults,
        heartbeat=heartbeat,
        hosts=hosts,
        rank_compute=RankComputeTimer(engine.blocks, device, whole_blocks=engine.settings.compile_blocks),
    )
    return trainer, run_logger


def check(cfg: RunConfig, env: Environment) -> tuple[ParallelDims, torch.device]:
    """Checks everything that can be checked without other ranks; raises :class:`ConfigError`."""
    dims = resolve_parallel_dims(cfg.parallel, env.world_size)
    check_tp(cfg.model, dims.tp)
    cfg = fit_stages(cfg, dims)
    if absent := [rank for rank in cfg.run.profile.ranks if rank >= env.world_size]:
        raise ConfigError(f"run.profile.ranks: there is no rank {absent[0]}; possible: 0 to {env.world_size - 1}")
    device = choose_device(cfg.device, env.local_rank)
    try:
        check_backend(cfg.attention.backend, device, dtype=compute_dtype(cfg), head_dim=cfg.model.head_dim)
        check_compile(cfg)
        choose_kernels(cfg.kernels, device)
        plan_fp8_linears(cfg, dims.tp, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return dims, device


def fit_stages(cfg: RunConfig, dims: ParallelDims) -> RunConfig:
    """With the micro-batches that fit the number of ranks; raises :class:`ConfigError` for impossible batches."""
    return dataclasses.replace(cfg, stages=tuple(stage.fitted(dims.dp) for stage in cfg.stages))


def derive_stages(cfg: RunConfig, dims: ParallelDims) -> list[Stage]:
    """Stages with accumulation and FLOPs; raises :class:`ConfigError` for impossible batches."""
    stages: list[Stage] = []
    start = 0
    for stage in fit_stages(cfg, dims).stages:
        accumulation = stage.global_batch // dims.dp // stage.micro_batch
        image_flops = training_flops(cfg.model, stage.resolution, stage.resolution)
        stages.append(Stage(cfg=stage, accumulation=accumulation, image_flops=image_flops, start=start))
        start += stage.steps
    return stages


def _callbacks(
    cfg: RunConfig,
    dims: ParallelDims,
    engine: Engine,
    text: TextEncoder | None,
    device: torch.device,
    run_logger: RunLogger,
    hosts: list[str],
) -> list[Callback]:
    def side_at(step: int) -> int:
        """Of the images of the stage that step ``step`` (counted from 1) belongs to."""
        ends = itertools.accumulate(stage.steps for stage in cfg.stages)
        sides = [stage.resolution for stage, end in zip(cfg.stages, ends, strict=True) if step <= end]
        return sides[0] if sides else cfg.stages[-1].resolution

    def draw(
        step: int, requests: Sequence[SampleRequest], sampler: SamplerConfig, batch: int
    ) -> tuple[Sequence[EvaluationImage], int]:
        prediction, t_eps = cfg.objective.prediction, cfg.objective.t_eps
        generator = ImageGenerator(
            velocity_of(engine.predict, cfg.model.patch_size, prediction=prediction, t_eps=t_eps),
            cfg.model,
            encode=text.encode if text is not None else None,
            null=text.null if text is not None else torch.tensor(cfg.model.num_classes),
            device=device,
            step=step,
        )
        side, rank = side_at(step), dist.get_rank()
        generate = partial(generator.images, size=(side, side), sampler=sampler, batch=batch)
        with engine.ema_weights():
            share = generate_share(generate, requests, rank=dims.dp_rank(rank), world=dims.dp)
        # Ranks of a tp group drew the same images; one of them answers for them.
        return share if rank % dims.tp == 0 else [], side

    layout = {"world_size": dist.get_world_size(), "layout": dataclasses.asdict(dims)}
    return [
        CollectGarbage(cfg.run.gc_every),
        LogRun(run_logger, {**layout, "hosts": sorted(set(hosts))}),
        # Before the callbacks that draw images: after the last profiled step these are no part of the trace.
        ProfileSteps(cfg.run.profile, Path(cfg.run.dir) / "profile"),
        SaveConfig(cfg),
        CheckReplicas(cfg.faults.check_replicas_every),
        SampleImages(cfg.samples, draw, run_logger, Path(cfg.run.dir)),
        Evaluate(cfg, draw, run_logger, device),
    ]


def _prepare_folder(folder: Path, checkpoints: CheckpointManager) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={folder}: {error.strerror}") from error
    checkpoints.prepare()
