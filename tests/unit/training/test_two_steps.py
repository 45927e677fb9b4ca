"""Two training steps, from bytes and labels to weights and averages, against the formulas in float64."""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import EngineSettings
from deco_scale.parallel.engines.fsdp import FsdpEngine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import PrecisionConfig
from deco_scale.training.config import RunSettings, StageConfig
from deco_scale.training.inputs import Batch, InputBuilder
from deco_scale.training.trainer import Stage, Trainer
from tests.support import formulas
from tests.support.saving import alone

CPU = torch.device("cpu")
# Two rows and three columns of patches: what mixes the axes up is seen.
ROWS, COLS, PATCH, HEADS, FEATURES = 2, 3, 8, 2, 5
SAMPLES, MICROS, CLASSES = 12, 3, 6
SEED, SHIFT, DROPOUT, LR, BETAS = 11, 3.0, 0.4, 1e-2, (0.8, 0.9)
EPS, WEIGHT_DECAY, CLIP_NORM, EMA_DECAY = 1e-3, 0.1, 0.5, 0.7
TEXT_TOKENS, TEXT_DIM = 4, 6
MODELS = {
    "c2i_deco": ModelConfig(
        kind="c2i_deco", dim=16, num_heads=HEADS, num_blocks=2, patch_size=PATCH, decoder_width=6,
        decoder_blocks=2, num_classes=CLASSES,
    ),
    "t2i_deco": ModelConfig(
        kind="t2i_deco", dim=16, num_heads=HEADS, num_blocks=2, num_text_blocks=1, patch_size=PATCH,
        decoder_width=6, decoder_blocks=1, text_dim=TEXT_DIM, text_tokens=TEXT_TOKENS,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def group(one_thread: None) -> Iterator[None]:
    with alone():
        yield


def encode_image(image: Tensor) -> Tensor:
    """Stands for the image encoder: features (B, N, F) that depend on every pixel's value, curved and not."""
    mixing = torch.linspace(-1, 1, 3 * FEATURES, dtype=image.dtype).view(3, FEATURES)
    blocks = image.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)
    return (blocks.exp().mean(dim=(-1, -2)).flatten(2).transpose(1, 2) @ mixing).sin()


def texts() -> Tensor:
    """States (CLASSES + 1, L, T) of the captions "0", "1", ...; the last row is the null text."""
    return torch.randn(CLASSES + 1, TEXT_TOKENS, TEXT_DIM, generator=torch.Generator().manual_seed(5))


def batch_of(step: int) -> Batch:
    random = np.random.default_rng(step)
    # A coarse image and fine noise: both low and high frequencies count.
    coarse = random.integers(0, 200, (SAMPLES, ROWS, COLS, 3)).repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    images = (coarse + random.integers(0, 56, coarse.shape)).astype(np.uint8)
    labels = [int(label) for label in random.permutation(np.arange(SAMPLES) % CLASSES)]
    numbers = range(step * SAMPLES, (step + 1) * SAMPLES)
    return Batch(images, [str(label) for label in labels], labels, numbers, None)


def engine_with_all_weights_at_work(model: ModelConfig) -> FsdpEngine:
    """Fresh models give zero everywhere; here every parameter matters, and averages differ from weights."""
    engine = FsdpEngine(
        lambda: Objective(Denoiser(model), objective_config(), encoder_dim=FEATURES),
        EngineSettings(
            dims=ParallelDims(1, 1, 1),
            device=CPU,
            optimizer=OptimizerConfig(
                weight_decay=WEIGHT_DECAY, eps=EPS, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY
            ),
            precision=PrecisionConfig(compute="fp32"),
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for name, tensor in state_of(engine, "model", "ema").items():
        is_norm = "norm" in name and name.endswith("weight")
        tensor.normal_(mean=1.0 if is_norm else 0.0, std=0.25, generator=generator)
    return engine


def objective_config() -> ObjectiveConfig:
    return ObjectiveConfig(repa_layer=1, condition_dropout=DROPOUT)


def state_of(engine: FsdpEngine, *kinds: str) -> dict[str, Tensor]:
    state = {name: cast(Any, tensor).to_local() for name, tensor in engine.state().items()}
    return {name: tensor for name, tensor in state.items() if name.split(".")[0] in kinds}


def loop_of(engine: FsdpEngine, model: ModelConfig) -> tuple[Trainer, Stage]:
    stage = Stage(
        cfg=StageConfig(
            name="a", resolution=PATCH, steps=9, global_batch=SAMPLES, micro_batch=SAMPLES // MICROS, lr=LR,
            betas=BETAS, timestep_shift=SHIFT,
        ),
        accumulation=MICROS,
        image_flops=1.0,
    )  # fmt: skip
    is_text = model.kind == "t2i_deco"
    build_inputs = InputBuilder(
        seed=SEED, device=CPU, objective=objective_config(),
        null=texts()[-1] if is_text else torch.tensor(CLASSES), num_classes=model.num_classes,
        encode_image=encode_image,
        encode_text=(lambda captions: texts()[[int(c) for c in captions]]) if is_text else None,
    )  # fmt: skip
    nothing = cast(Any, None)
    trainer = Trainer(
        settings=RunSettings(dir="x"), stages=[stage], engine=engine, build_inputs=build_inputs, open_data=nothing,
        checkpoints=nothing, device=CPU, config={},
    )  # fmt: skip
    return trainer, stage


class Expected:
    """The same steps by the formulas, the whole batch at once."""

    def __init__(self, engine: FsdpEngine, model: ModelConfig) -> None:
        plain = {
            kind: {n[len(kind) + 1 :]: t for n, t in state_of(engine, kind).items()} for kind in ("model", "ema")
        }
        self.optimizer = formulas.AdamWWithAverage(
            plain["model"], plain["ema"], eps=EPS, weight_decay=WEIGHT_DECAY
        )
        self.is_text = model.kind == "t2i_deco"
        self.shape = formulas.Shape(ROWS, COLS, PATCH, HEADS, self.is_text, repa_layer=1)
        self.dropped: list[bool] = []

    def step(self, batch: Batch) -> tuple[dict[str, float], float]:
        image = torch.tensor(np.array(batch.images), dtype=torch.float64).permute(0, 3, 1, 2) / 255 * 2 - 1
        times, noises, conditions = [], [], []
        for number, label in zip(batch.sample_ids, batch.labels, strict=True):
            normal, _, dropout, noise = formulas.sample_draws(SEED, number, image.shape[1:])
            times.append(formulas.logit_normal_time(normal, SHIFT))
            noises.append(noise)
            # The null condition is the last row.
            conditions.append(CLASSES if dropout < DROPOUT else label)
            self.dropped.append(dropout < DROPOUT)
        condition = torch.tensor(conditions)
        weights = {name: p.requires_grad_() for name, p in self.optimizer.parameters.items()}
        losses = formulas.losses_of(
            weights, image, torch.stack(noises), torch.tensor(times, dtype=torch.float64),
            texts().double()[condition] if self.is_text else condition, encode_image(image), self.shape,
        )  # fmt: skip
        grads = dict(zip(weights, torch.autograd.grad(losses["loss"], list(weights.values())), strict=True))
        with torch.no_grad():
            norm = self.optimizer.update(grads, lr=LR, betas=BETAS, clip_norm=CLIP_NORM, ema_decay=EMA_DECAY)
        return {name: value.item() for name, value in losses.items()}, norm

    def state(self) -> dict[str, Tensor]:
        kinds = {
            "model": self.optimizer.parameters, "ema": self.optimizer.averages,
            "exp_avg": self.optimizer.exp_avg, "exp_avg_sq": self.optimizer.exp_avg_sq,
        }  # fmt: skip
        return {f"{kind}.{name}": tensor for kind, tensors in kinds.items() for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", MODELS)
def test_two_steps_have_the_values_of_the_formulas(kind: str) -> None:
    model = MODELS[kind]
    engine = engine_with_all_weights_at_work(model)
    start = {name: tensor.clone() for name, tensor in state_of(engine, "model", "ema").items()}
    expected, (trainer, stage) = Expected(engine, model), loop_of(engine, model)
    for step in (1, 2):
        result = trainer.step(stage, batch_of(step), lr=LR)
        losses, norm = expected.step(batch_of(step))
        assert norm > 2 * CLIP_NORM, "the gradient must be one that is clipped"
        actual = {name: value.item() for name, value in result.losses.items()}
        assert actual == pytest.approx(losses, rel=2e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-4) and result.skipped.item() == 0
        compare(state_of(engine, "model", "ema", "exp_avg", "exp_avg_sq"), expected.state())
    assert engine.optimizer_steps == 2
    assert 3 < sum(expected.dropped) < len(expected.dropped) - 3
    # Nothing stood still, except for what has no average.
    state = state_of(engine, "model", "ema")
    assert not any(torch.equal(tensor, state[name]) for name, tensor in start.items())


def compare(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        size = tensor.abs().max().item()
        error = (actual[name].double() - tensor.detach()).abs().max().item()
        assert error <= 1e-4 * size, f"{name}: {error:.2e} off, the largest value is {size:.2e}"


def test_only_the_denoiser_is_averaged() -> None:
    engine = engine_with_all_weights_at_work(MODELS["c2i_deco"])
    names = {kind: [n.split(".", 1)[1] for n in state_of(engine, kind)] for kind in ("model", "ema")}
    assert names["ema"] == [name for name in names["model"] if name.startswith("denoiser.")]
    assert any(name.startswith("repa_head.") for name in names["model"])


def test_the_batch_of_a_step_is_used_in_order_whatever_the_accumulation() -> None:
    """Micro-batches of another size are the same step: same samples, same mean, same update."""
    found = []
    for micros in (1, 2, 6):
        engine = engine_with_all_weights_at_work(MODELS["c2i_deco"])
        trainer, stage = loop_of(engine, MODELS["c2i_deco"])
        result = trainer.step(Stage(cfg=stage.cfg, accumulation=micros, image_flops=1.0), batch_of(1), lr=LR)
        found.append((result, {n: t.clone() for n, t in state_of(engine, "model", "exp_avg").items()}))
    (first, weights), *others = found
    for result, other in others:
        assert_same_losses(result.losses, first.losses)
        assert result.grad_norm.item() == pytest.approx(first.grad_norm.item(), rel=1e-5)
        compare(other, {name: tensor.double() for name, tensor in weights.items()})


def assert_same_losses(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    values = {name: value.item() for name, value in expected.items()}
    assert {name: value.item() for name, value in actual.items()} == pytest.approx(values, rel=1e-5)


def test_an_engine_differentiates_the_scaled_loss_and_tells_the_loss_itself() -> None:
    model = MODELS["c2i_deco"]
    found = []
    for scales in ((1.0,), (0.25,), (0.5, 0.5), (1.0, -0.5)):
        engine = engine_with_all_weights_at_work(model)
        trainer, _ = loop_of(engine, model)
        inputs = trainer.build_inputs(batch_of(1), SHIFT)
        losses = [
            engine.forward_backward(inputs, scale=scale, last=index == len(scales) - 1)["loss"].item()
            for index, scale in enumerate(scales)
        ]
        norm = engine.update(lr=LR, betas=BETAS).grad_norm.item()
        found.append((sum(scales), norm, losses))
    _, whole, (loss,) = found[0]
    for scale, norm, losses in found:
        assert norm == pytest.approx(scale * whole, rel=1e-5)
        assert losses == pytest.approx([loss] * len(losses), rel=1e-6)
