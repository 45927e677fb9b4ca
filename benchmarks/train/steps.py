"""The real training step of a configuration on synthetic data, which throughput and the GPU suite measure.

Engine, step, randomness and losses are those of a run. Images are random; unless encoders are asked for, random
text embeddings and features replace their outputs.
"""

import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.train.eager_reference import make_reference
from benchmarks.train.parts import Timeline
from benchmarks.train.plain_engine import PlainEngine, build_plain_engine
from deco_scale.config import RunConfig
from deco_scale.distributed.bootstrap import Environment, choose_device, init_distributed
from deco_scale.errors import ConfigError
from deco_scale.kernels.select import Kernels, choose_kernels
from deco_scale.models.attention.autotune import BackendChoice, table_of
from deco_scale.models.attention.dispatch import AttentionSetting, check_backend
from deco_scale.models.tp_plan import check_tp
from deco_scale.objectives import Objective
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.parallel.engines.base import Engine, Update
from deco_scale.parallel.mesh import ParallelDims, resolve_parallel_dims
from deco_scale.training.inputs import Batch, InputBuilder, pinned, split
from deco_scale.training.prefetch import HostPrefetcher
from deco_scale.training.train_step import StepResult, train_step
from deco_scale.training.trainer import Data, Stage
from launcher.build.data import SyntheticData, load_encoders, open_loader, shared_over_tp
from launcher.build.engine import build_engine
from launcher.build.model import choose_attention, objective_builder, plan_fp8_linears
from launcher.build.trainer import derive_stages

ENCODER_DIM = 768
"""Width of DINOv2-B's tokens, where no image encoder is loaded."""


class TimedEngine:
    """An engine whose update is a part of its own; forward and backward mark their parts by hooks."""

    def __init__(self, engine: Engine, timeline: Timeline) -> None:
        self._engine, self._timeline = engine, timeline

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, torch.Tensor]:
        self._timeline.mark("other")
        losses = self._engine.forward_backward(inputs, scale=scale, last=last)
        self._timeline.mark("other")
        return losses

    def update(self, *, lr: float, betas: tuple[float, float], should_skip: torch.Tensor | None = None) -> Update:
        self._timeline.mark("optimizer")
        update = self._engine.update(lr=lr, betas=betas, should_skip=should_skip)
        self._timeline.mark("other")
        return update


class TrainingSteps:
    """Steps of the first stage of ``cfg`` in this process's place among the others; joins the process group.

    ``encoders`` loads the frozen encoders; ``data`` reads real samples through the loader and the feed;
    ``straightforward`` takes the eager reference model. ``plain`` takes a :class:`PlainEngine`; ``reuse`` is the
    one of earlier steps of the same model, whose kernels and attention then hold instead of those of ``cfg``.
    ``attention`` is what was chosen before, so that nothing is measured again. Raises :class:`ConfigError`
    where the configuration does not fit the processes or the device.
    """

    def __init__(
        self,
        cfg: RunConfig,
        env: Environment,
        *,
        encoders: bool = False,
        data: bool = False,
        straightforward: bool = False,
        plain: bool = False,
        reuse: PlainEngine | None = None,
        attention: Sequence[BackendChoice] = (),
    ) -> None:
        self._straightforward = straightforward
        self.cfg, self.layout = cfg, resolve_parallel_dims(cfg.parallel, env.world_size)
        check_tp(cfg.model, self.layout.tp)
        self.device = choose_device(cfg.device, env.local_rank)
        self.kernels = _checked(cfg, self.device)
        self.stage = derive_stages(cfg, self.layout)[0]
        torch.set_float32_matmul_precision("high" if cfg.precision.compute != "fp32" else "highest")
        init_distributed(env, self.device)
        self.objectives: list[Objective] = []
        self.attention = list(attention)
        text, image = load_encoders(cfg, self.device, need_text=True) if encoders else (None, None)
        repa = cfg.objective.repa_weight > 0
        width = image.width if image is not None else (ENCODER_DIM if repa else 0)
        self.engine = cast(Any, reuse or self._build(width, plain))
        encode_image = _constant_features(self.cfg, self.stage, width, self.device) if repa else None
        if image is not None:
            encode_image = shared_over_tp(image.encode, self.engine.tokens)
        null = torch.tensor(cfg.model.num_classes, device=self.device)
        if cfg.model.kind == "t2i_deco":
            null = torch.zeros(cfg.model.text_tokens, cfg.model.text_dim, device=self.device)
        self._prepare = InputBuilder(
            seed=cfg.run.seed,
            device=self.device,
            objective=cfg.objective,
            null=text.null if text is not None else null,
            num_classes=cfg.model.num_classes,
            encode_text=shared_over_tp(text.encode, self.engine.tokens) if text is not None else None,
            encode_image=encode_image,
        )
        self._source = _open(self.cfg, self.layout, self.stage, data)
        batches: Iterator[Batch] = iter(self._source)
        if cfg.model.kind == "t2i_deco" and text is None:
            batches = _with_embeddings(batches, cfg)
        ready: Callable[[Batch], Batch] | None = None
        if self.device.type == "cuda":
            ready = functools.partial(pinned, null_shape=self._prepare.null.shape)
        self._feed = HostPrefetcher(batches, depth=2, prepare=ready) if data else None
        self._batches: Iterator[Batch] = self._feed or _in_memory(batches, ready)

    def _build(self, encoder_dim: int, plain: bool) -> Any:
        """The configured engine, or none around the objective."""
        attention: AttentionSetting
        if self.attention:
            attention = table_of(self.attention)
        else:
            attention, choices = choose_attention(self.cfg, self.layout.tp, self.device)
            self.attention = list(choices)
        plan = plan_fp8_linears(self.cfg, self.layout.tp, self.device)
        build = self._recorded(encoder_dim, attention)
        if plain:
            return build_plain_engine(build, self.cfg, self.device, kernels=self.kernels, fp8_plan=plan)
        return build_engine(self.cfg, self.layout, self.device, build, plan)

    def _recorded(self, encoder_dim: int, attention: AttentionSetting) -> Callable[[], Objective]:
        """The builder of the objective; it keeps what it built, the engine's last."""
        build = objective_builder(self.cfg, encoder_dim, self.kernels, attention)

        def record() -> Objective:
            objective = make_reference(build()) if self._straightforward else build()
            self.objectives.append(objective)
            return objective

        return record

    @property
    def samples(self) -> int:
        """Samples of a step over all processes."""
        return self.stage.cfg.global_batch

    def next_batch(self) -> tuple[Batch, float]:
        """The next share of a global batch, and the seconds waited for it."""
        began = time.perf_counter()
        batch = next(self._batches)
        return batch, time.perf_counter() - began

    def step(self, batch: Batch, timeline: Timeline | None = None) -> StepResult:
        """One update on ``batch``; ``timeline`` is told which part of the step runs."""
        engine: Any = self.engine if timeline is None else TimedEngine(self.engine, timeline)
        return train_step(
            engine,
            self._inputs(batch, timeline),
            num_micro_batches=self.stage.accumulation,
            lr=self.stage.cfg.lr,
            betas=self.stage.cfg.betas,
        )

    def trace(self, steps: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of some steps."""
        results = [self.step(self.next_batch()[0]) for _ in range(steps)]
        return [(r.losses["loss"].item(), r.grad_norm.item()) for r in results]

    def close(self) -> None:
        """Stop reading."""
        self._source.close()
        if self._feed is not None:
            self._feed.close()

    def _inputs(self, batch: Batch, timeline: Timeline | None) -> Iterator[ObjectiveInputs]:
        for part in split(batch, self.stage.accumulation):
            if timeline is not None:
                timeline.mark("inputs")
            yield self._prepare(part, self.stage.cfg.timestep_shift)


def leave() -> None:
    """End this process's group, if there is one."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _checked(cfg: RunConfig, device: torch.device) -> Kernels:
    try:
        dtype = torch.float32 if cfg.precision.compute == "fp32" else torch.bfloat16
        check_backend(cfg.attention.backend, device, dtype=dtype, head_dim=cfg.model.head_dim)
        return choose_kernels(cfg.kernels, device)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _open(cfg: RunConfig, layout: ParallelDims, stage: Stage, data: bool) -> Data:
    if not data:
        return SyntheticData(layout, stage.cfg, 0)
    Path(cfg.run.dir).mkdir(parents=True, exist_ok=True)
    return open_loader(cfg, layout, None, stage.cfg, 0)


def _constant_features(
    cfg: RunConfig, stage: Stage, width: int, device: torch.device
) -> Callable[[Any], torch.Tensor]:
    """Image tokens (B, N, F) that are there already, the same for every batch."""
    rows, cols = cfg.model.grid(stage.cfg.resolution, stage.cfg.resolution)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(stage.cfg.micro_batch, rows * cols, width, generator=generator).to(device)
    return lambda images: features[: len(images)]


def _with_embeddings(batches: Iterator[Batch], cfg: RunConfig) -> Iterator[Batch]:
    """Random text embeddings, as bfloat16 bits, in place of captions; each sample's follow from its id."""
    shape = (cfg.model.text_tokens, cfg.model.text_dim)
    generator = torch.Generator().manual_seed(0)
    pool = (
        torch.randn(16, *shape, generator=generator).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    )
    for batch in batches:
        embeddings = [pool[sample_id % len(pool)] for sample_id in batch.sample_ids]
        yield Batch(batch.images, batch.captions, batch.labels, batch.sample_ids, embeddings)


def _in_memory(
    batches: Iterator[Batch], ready: Callable[[Batch], Batch] | None, count: int = 2
) -> Iterator[Batch]:
    """A few batches over and over, prepared as the prefetcher does, so that they cost a step nothing."""
    in_memory = [next(batches) for _ in range(count)]
    yield from itertools.cycle([ready(batch) for batch in in_memory] if ready else in_memory)


def resolved_layout(layout: ParallelDims) -> dict[str, int]:
    """The mesh as result files have it."""
    return json.loads(json.dumps(dataclasses.asdict(layout)))  # type: ignore[no-any-return]
