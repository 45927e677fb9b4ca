"""From a configuration to a running loop: the one place where models, data and engines meet."""

import dataclasses
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.errors import DataError
from data_pipeline.stream.loader import Batch, Loader
from deco_scale.checkpoint.manager import CheckpointManager
from deco_scale.config import RunConfig, dump_config
from deco_scale.distributed.collectives import gather_objects, raise_together, run_on_rank_zero
from deco_scale.distributed.signals import StopRequest
from deco_scale.errors import ConfigError, RunError
from deco_scale.kernels import Kernels, choose_kernels, use_kernels
from deco_scale.models import Denoiser
from deco_scale.models.attention import AttentionSetting
from deco_scale.models.attention.autotune import BackendChoice, choose_backend, model_shapes, table_of
from deco_scale.models.encoders import EncoderError, ImageEncoder, TextEncoder, text_identity
from deco_scale.models.layers import Attention
from deco_scale.objectives import Objective
from deco_scale.observability.run_logger import RunLogger
from deco_scale.parallel.engines.base import Engine
from deco_scale.parallel.mesh import ParallelDims, accumulation_steps
from deco_scale.parallel.sequence_parallel import encode_shared
from deco_scale.planning.flops import peak_flops, training_flops
from deco_scale.precision.fp8_plan import Fp8Plan
from deco_scale.precision.recipe import choose_fp8
from deco_scale.training.config import StageConfig
from deco_scale.training.encoder_prefetch import EncoderPrefetcher
from deco_scale.training.inputs import InputBuilder, padded_states
from deco_scale.training.metrics import RankComputeTimer
from deco_scale.training.trainer import Data, Heartbeat, Stage, Trainer
from deco_scale.watchdog.client import NoWatchdog
from launcher.build.precision import plan_precision
from launcher.evaluation import evaluator
from launcher.pictures import picture_maker


def derive_stages(cfg: RunConfig, layout: ParallelDims) -> list[Stage]:
    """Stages with accumulation and FLOPs; raises :class:`ConfigError` for impossible batches."""
    return [
        Stage(
            cfg=stage,
            accumulation=accumulation_steps(
                global_batch=stage.global_batch,
                micro_batch=stage.micro_batch,
                dp=layout.dp,
                where=f"stages.{stage.name}",
            ),
            image_flops=training_flops(cfg.model, stage.resolution, stage.resolution),
        )
        for stage in cfg.stages
    ]


def load_encoders(
    cfg: RunConfig, device: torch.device, *, need_text: bool
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """Frozen encoders that the configuration asks for, checked against the model."""
    text = image = None
    try:
        if cfg.model.kind == "t2i_deco" and need_text:
            assert cfg.text_encoder is not None
            text = TextEncoder.load(cfg.text_encoder, device)
            if text.width != cfg.model.text_dim:
                raise ConfigError(
                    f"text_encoder.path={cfg.text_encoder.path} gives {text.width} values a token, "
                    f"model.text_dim is {cfg.model.text_dim}"
                )
        if cfg.objective.repa_weight > 0:
            assert cfg.image_encoder is not None
            image = ImageEncoder.load(cfg.image_encoder, device)
    except EncoderError as error:
        raise ConfigError(str(error)) from error
    return text, image


def choose_attention(
    cfg: RunConfig, layout: ParallelDims, device: torch.device
) -> tuple[AttentionSetting, list[BackendChoice]]:
    """The named backend; for ``auto`` on a GPU the kernels that rank 0 measured, the same on every rank."""
    if cfg.attention.backend != "auto" or device.type != "cuda":
        return cfg.attention.backend, []
    dtype = torch.float32 if cfg.precision.compute == "fp32" else torch.bfloat16

    def measure() -> list[BackendChoice]:
        try:
            shapes = dict.fromkeys(
                shape
                for stage in cfg.stages
                for shape in model_shapes(
                    cfg.model, resolution=stage.resolution, batch=stage.micro_batch, tp=layout.tp
                )
            )
            return [choose_backend(shape, device=device, dtype=dtype) for shape in shapes]
        except ValueError as error:
            raise ConfigError(str(error)) from error

    found = run_on_rank_zero(measure)
    return table_of(found), found


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


def fp8_plan_of(cfg: RunConfig, layout: ParallelDims, device: torch.device) -> Fp8Plan | None:
    """What computes in FP8 where the configuration asks for it; raises :class:`ConfigError` where it cannot."""
    if cfg.precision.compute != "fp8":
        return None
    return plan_precision(cfg, layout.tp, choose_fp8(cfg.precision, device))


def build_engine(
    cfg: RunConfig,
    layout: ParallelDims,
    device: torch.device,
    build: Callable[[], Objective],
    fp8_plan: Fp8Plan | None = None,
) -> Engine:
    """The configured engine around a freshly initialised objective; ``fp8_plan`` goes with ``compute: fp8``."""
    if cfg.parallel.engine == "deepspeed":
        from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(
            build,
            layout=layout,
            stage=cfg.parallel.zero_stage,
            micro_batch=cfg.stages[0].micro_batch,
            device=device,
            optimizer=cfg.optimizer,
            kernels=choose_kernels(cfg.kernels, device),
            precision=cfg.precision,
            fp8_plan=fp8_plan,
            compile_blocks=cfg.compile,
            recompute=cfg.parallel.activation_checkpointing,
            seed=cfg.run.seed,
            overrides=cfg.parallel.deepspeed,
        )
    from deco_scale.parallel.engines.fsdp import FsdpEngine

    return FsdpEngine(
        build,
        layout=layout,
        device=device,
        optimizer=cfg.optimizer,
        kernels=choose_kernels(cfg.kernels, device),
        precision=cfg.precision,
        fp8_plan=fp8_plan,
        compile_blocks=cfg.compile,
        recompute=cfg.parallel.activation_checkpointing,
        seed=cfg.run.seed,
    )


def data_opener(
    cfg: RunConfig,
    layout: ParallelDims,
    folder: Path,
    *,
    synthetic: bool,
    identity: dict[str, Any] | None,
) -> Callable[[StageConfig, int], Data]:
    """Opens a stage's loader on all ranks together; bad samples go to ``quarantine.jsonl``.

    ``identity`` is that of the text encoder where text states are read.
    """
    if synthetic:
        return lambda stage, samples: SyntheticData(stage, layout)

    def quarantine(entry: dict[str, Any]) -> None:
        with (folder / "quarantine.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({"rank": dist.get_rank(), **entry}) + "\n")

    def open_one(stage: StageConfig, samples: int) -> Loader:
        try:
            data = dataclasses.replace(cfg.data, url=stage.data, mixture=()) if stage.data else cfg.data
            return Loader(
                data,
                resolution=stage.resolution,
                multiple=cfg.model.patch_size,
                seed=cfg.run.seed,
                global_batch=stage.global_batch,
                rank=layout.dp_rank(dist.get_rank()),
                world=layout.dp,
                start=samples,
                text_identity=identity,
                on_bad=quarantine,
            )
        except DataError as error:
            raise RunError(str(error)) from error

    return lambda stage, samples: raise_together(lambda: open_one(stage, samples))


def _text_identity(cfg: RunConfig) -> dict[str, Any]:
    assert cfg.text_encoder is not None
    try:
        return text_identity(cfg.text_encoder, cfg.model.text_dim)
    except EncoderError as error:
        raise ConfigError(str(error)) from error


def shared_over_tp(encode: Callable[[Any], torch.Tensor], engine: Engine) -> Callable[[Any], torch.Tensor]:
    """Encode once per tp group, each rank a part of the batch; as it is without tensor parallelism."""
    tokens = engine.tokens
    if tokens is None:
        return encode
    return lambda items: encode_shared(encode, items, len(items), tokens)


class SyntheticData:
    """Random pictures with empty captions, for ``--dry-run``."""

    counters: dict[str, int] = {}

    def __init__(self, stage: StageConfig, layout: ParallelDims) -> None:
        self._stage, self._rank, self._world = stage, layout.dp_rank(dist.get_rank()), layout.dp

    def __iter__(self) -> Iterator[Batch]:
        side, step = self._stage.resolution, 0
        while True:
            first = step * self._stage.global_batch
            sample_ids = list(range(first + self._rank, first + self._stage.global_batch, self._world))
            random = np.random.default_rng(sample_ids[0])
            shape = (len(sample_ids), side, side, 3)
            yield Batch(
                images=random.integers(0, 256, shape, dtype=np.uint8),
                captions=[""] * len(sample_ids),
                text_embeddings=None,
                labels=[0] * len(sample_ids),
                sample_ids=sample_ids,
            )
            step += 1

    def state(self, samples: int) -> dict[str, Any]:
        return {"synthetic": True, "samples": samples}

    def close(self) -> None:
        """Nothing to stop."""


def assemble(
    cfg: RunConfig,
    layout: ParallelDims,
    device: torch.device,
    *,
    stages: list[Stage],
    checkpoints: CheckpointManager,
    dry_run: bool = False,
    stop: StopRequest | None = None,
    heartbeat: Heartbeat | None = None,
) -> Trainer:
    """Build everything, all ranks together; errors that have a name are shared by all ranks."""
    folder = Path(cfg.run.dir)
    rank = dist.get_rank()
    raise_together(lambda: _prepare_folder(folder, checkpoints) if rank == 0 else None)
    precomputed = cfg.data.has_text_embeddings and not dry_run
    identity = raise_together(lambda: _text_identity(cfg)) if precomputed else None
    # Fail on bad data before minutes are spent on encoders and engines.
    first = data_opener(cfg, layout, folder, synthetic=dry_run, identity=identity)(cfg.stages[0], 0)
    states_null = first.null_text_embedding if isinstance(first, Loader) else None
    first.close()
    need_text = not precomputed or cfg.samples.every > 0 or cfg.evaluation.every > 0
    text, image = raise_together(lambda: load_encoders(cfg, device, need_text=need_text))
    kernels = choose_kernels(cfg.kernels, device)
    attention, choices = choose_attention(cfg, layout, device)
    build = objective_builder(cfg, image.width if image is not None else 0, kernels, attention)
    fp8_plan = raise_together(lambda: fp8_plan_of(cfg, layout, device))
    engine = build_engine(cfg, layout, device, build, fp8_plan)
    plain = json.loads(json.dumps(dataclasses.asdict(cfg)))
    reporter = RunLogger(
        folder,
        active=rank == 0,
        total_steps=sum(stage.cfg.steps for stage in stages),
        wandb=cfg.wandb,
        monitor=cfg.monitor,
        config=plain,
    )
    for choice in choices:
        reporter.say(choice.line())
    for line in fp8_plan.messages() if fp8_plan else ():
        reporter.say(line)
    encode_text = None
    if states_null is not None:
        shape = (cfg.model.text_tokens, cfg.model.text_dim)
        null = padded_states([states_null], shape)[0].to(device)
    elif text is not None:
        null, encode_text = text.null, shared_over_tp(text.encode, engine)
    else:
        null = torch.tensor(cfg.model.num_classes, device=device)
    prepare = InputBuilder(
        seed=cfg.run.seed,
        device=device,
        objective=cfg.objective,
        null=null,
        num_classes=cfg.model.num_classes,
        encode_text=encode_text,
        encode_image=shared_over_tp(image.encode, engine) if image else None,
    )
    ahead = None
    text_ahead = encode_text is not None and cfg.text_encoder is not None and cfg.text_encoder.ahead
    image_ahead = image is not None and cfg.image_encoder is not None and cfg.image_encoder.ahead
    if text_ahead or image_ahead:
        ahead = EncoderPrefetcher(lambda part: prepare.encode(part, text=text_ahead, image=image_ahead), device)
    make_pictures = picture_maker(cfg, layout, engine, text, folder / "samples", reporter, device)
    evaluate = evaluator(cfg, layout, engine, text, folder / "evaluation", reporter, device)
    heartbeat = heartbeat or NoWatchdog()

    def after_step(step: int) -> None:
        if any(every and step % every == 0 for every in (cfg.samples.every, cfg.evaluation.every)):
            heartbeat.beat(step, "long_op")
        make_pictures(step)
        evaluate(step)

    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return Trainer(
        settings=cfg.run,
        stages=stages,
        engine=engine,
        prepare=prepare,
        open_data=data_opener(cfg, layout, folder, synthetic=dry_run, identity=identity),
        checkpoints=checkpoints,
        reporter=reporter,
        device=device,
        config=plain,
        after_step=after_step,
        peak_flops=peak * dist.get_world_size() if peak else None,
        ahead=ahead,
        stop=stop,
        faults=cfg.faults,
        heartbeat=heartbeat,
        hosts=gather_objects(socket.gethostname()),
        own_work=RankComputeTimer(engine.blocks, device, whole_blocks=cfg.compile),
    )


def _prepare_folder(folder: Path, checkpoints: CheckpointManager) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write to run.dir={folder}: {error.strerror}") from error
    checkpoints.prepare()


def save_config(cfg: RunConfig) -> None:
    """Write the resolved ``config.yaml`` of a run that is about to train; rank 0 only."""
    if dist.get_rank() == 0:
        (Path(cfg.run.dir) / "config.yaml").write_text(dump_config(cfg), encoding="utf-8")
