"""One cell of the ablation: images, classifier, training, and what is measured of it.

Shape letters: B batch, C channels, Y X pixels, F features of the classifier.
"""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data_pipeline.decode import cover_and_crop
from deco_scale.evaluation.fid import Gaussian, Moments, frechet_distance
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.config import Prediction
from deco_scale.objectives.flow_matching import noised
from deco_scale.optim.adamw_ema import AdamWWithEMA
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.init_weights import initial_tensors
from deco_scale.sampling import SamplerConfig, sample
from deco_scale.sampling.guidance import VelocityFn
from deco_scale.sampling.images import seeded_noise, to_uint8, velocity_of
from deco_scale.training.inputs import Batch, InputBuilder
from launcher.demo.dataset import SUBJECTS, crops

MEASURES = {"frechet": "(lower is better)", "accuracy": "(higher is better)", "heldout": "(lower is better)"}
"""What is measured of a cell, and how to read it."""
CLASSES = len(SUBJECTS)
FEATURES = 48 + 64
"""Of the classifier's two depths."""
LAST_TIME = 0.95
"""Held-out errors are of times before this: nearer to 1 a predicted image's velocity is clamped."""
_TRAIN, _REFERENCE, _HELDOUT = 0, 1, 2
"""Seeds of the three sets of crops."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What all cells share. The model is as wide for its patches as the paper's L (1024 for 768 values)."""

    side: int = 16
    patch_size: int = 4
    dim: int = 64
    num_heads: int = 4
    num_blocks: int = 4
    steps: int = 1000
    batch: int = 32
    lr: float = 1e-3
    ema_decay: float = 0.99
    condition_dropout: float = 0.1
    train_per_class: int = 500
    reference_per_class: int = 500
    heldout_per_class: int = 50
    samples_per_class: int = 100
    sampler_steps: int = 25
    classifier_steps: int = 400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """What differs between cells; ``decoder_width`` 0 is the baseline."""

    decoder_width: int = 0
    decoder_blocks: int = 0
    freq_weight: float = 0.0
    prediction: Prediction = "velocity"
    more_blocks: int = 0


VARIANTS = {
    "baseline": Variant(),
    "baseline+block": Variant(more_blocks=1),
    "baseline+freq": Variant(freq_weight=1.0),
    "baseline+image": Variant(prediction="image"),
    "deco": Variant(decoder_width=32, decoder_blocks=3),
    "deco+freq": Variant(decoder_width=32, decoder_blocks=3, freq_weight=1.0),
    "deco-w16": Variant(decoder_width=16, decoder_blocks=3),
    "deco-w64": Variant(decoder_width=64, decoder_blocks=3),
    "deco-d1": Variant(decoder_width=32, decoder_blocks=1),
    "deco-d6": Variant(decoder_width=32, decoder_blocks=6),
}
"""``+block`` has one DiT block more, ``+freq`` the frequency loss, ``+image`` predicts the image; ``-w`` and
``-d`` are the decoder's width and depth, compared without the frequency loss as in the paper's tables."""
COMPARISONS = (
    ("deco", "baseline", "FID 34.12 against 61.10"),
    ("deco", "baseline+block", "with fewer parameters"),
    ("deco+freq", "deco", "FID 31.35 against 34.12"),
    ("baseline+image", "baseline", "FID 39.06 against 61.10"),
    ("deco", "deco-w16", "FID 34.12 against 37.63"),
    ("deco", "deco-w64", "FID 34.12 against 35.88"),
    ("deco", "deco-d1", "FID 34.12 against 37.10"),
    ("deco", "deco-d6", "FID 34.12 against 35.46"),
)
"""Better, worse, and what arXiv 2511.19365 (tables 1 and 4) gives for ImageNet at 256 px."""


class LabelledImages(NamedTuple):
    """Crops ``(B, Y, X, 3)`` uint8, classes in turn; ``labels`` are their classes."""

    images: Any
    labels: Any


def prepare_images(settings: Settings, work: Path) -> None:
    """Draw the crops and train the classifier, unless they are in ``work`` already."""
    work.mkdir(parents=True, exist_ok=True)
    counts = (settings.train_per_class, settings.reference_per_class, settings.heldout_per_class)
    for number, count in zip((_TRAIN, _REFERENCE, _HELDOUT), counts, strict=True):
        path = _crops_path(work, settings, number, count)
        if not path.exists():
            size = (settings.side, settings.side)
            made = [
                [np.asarray(cover_and_crop(crop, size)) for crop in crops(subject, count, seed=number)]
                for subject in SUBJECTS
            ]
            # Classes in turn, so that any run of neighbours holds all of them.
            np.save(path, np.stack(made, axis=1).reshape(-1, settings.side, settings.side, 3))
    if not _classifier_path(work, settings).exists():
        torch.set_num_threads(1)
        classifier = train_classifier(_labelled_images(work, settings, _TRAIN, settings.train_per_class), settings)
        save_file(classifier.state_dict(), _classifier_path(work, settings))


def _crops_path(work: Path, settings: Settings, number: int, count: int) -> Path:
    return work / f"crops_{settings.side}px_{number}_{count}.npy"


def _classifier_path(work: Path, settings: Settings) -> Path:
    name = f"{settings.side}px_{settings.train_per_class}_{settings.classifier_steps}"
    return work / f"classifier_{name}.safetensors"


def _labelled_images(work: Path, settings: Settings, number: int, count: int) -> LabelledImages:
    images = np.load(_crops_path(work, settings, number, count), allow_pickle=False)
    return LabelledImages(images, np.arange(len(images)) % CLASSES)


class Classifier(nn.Module):
    """A small convolutional network; its features are means over the image at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.SiLU()
        )
        self.late = nn.Sequential(
            nn.Conv2d(48, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.SiLU(),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, image_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, classes)`` and features ``(B, F)`` of images in [-1, 1]."""
        early = self.early(image_BCYX)
        late = self.late(early).mean((2, 3))
        return self.head(late), torch.cat([early.mean((2, 3)), late], dim=1)


def train_classifier(dataset: LabelledImages, settings: Settings) -> Classifier:
    """Cross-entropy on real crops; the same weights every time on one thread."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = Classifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _, images, labels in _batches(dataset, settings, seed=0, steps=settings.classifier_steps):
        logits, _ = classifier(_as_input(images))
        optimizer.zero_grad()
        F.cross_entropy(logits, torch.as_tensor(labels)).backward()
        optimizer.step()
    return classifier


def _batches(
    dataset: LabelledImages, settings: Settings, *, seed: int, steps: int
) -> Iterator[tuple[int, Any, Any]]:
    """Number of the step, images and labels; epochs in orders of their own."""
    random, queue = np.random.default_rng(seed), np.empty(0, dtype=np.int64)
    for step in range(steps):
        while len(queue) < settings.batch:
            queue = np.concatenate([queue, random.permutation(len(dataset.labels))])
        chosen, queue = queue[: settings.batch], queue[settings.batch :]
        yield step, dataset.images[chosen], dataset.labels[chosen]


def _as_input(images: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def run_cell(settings: Settings, name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train a variant under a seed and measure it; runs in a process of its own on one thread."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    variant = VARIANTS[name]
    train = _labelled_images(work, settings, _TRAIN, settings.train_per_class)
    reference = _labelled_images(work, settings, _REFERENCE, settings.reference_per_class)
    heldout = _labelled_images(work, settings, _HELDOUT, settings.heldout_per_class)
    classifier = Classifier()
    classifier.load_state_dict(load_file(_classifier_path(work, settings)))
    objective = build(settings, variant, seed)
    optimizer, losses = train_variant(objective, train, settings, seed)
    real, _ = measure(classifier, reference)
    fresh, real_accuracy = measure(classifier, heldout)
    with optimizer.swap_ema(), torch.no_grad():
        cfg = objective.cfg
        velocity = velocity_of(objective.predict, settings.patch_size, prediction=cfg.prediction, t_eps=cfg.t_eps)
        drawn = draw_samples(velocity, settings, seed)
        heldout_error = velocity_error(velocity, heldout, settings)
    found, accuracy = measure(classifier, drawn)
    return {
        "variant": name,
        "seed": seed,
        "parameters": sum(p.numel() for p in objective.parameters()),
        "frechet": frechet_distance(found, real),
        "accuracy": accuracy,
        "heldout": heldout_error,
        "train_loss": float(np.mean(losses[-20:])),
        "frechet_of_real_crops": frechet_distance(fresh, real),
        "classifier_accuracy": real_accuracy,
        "seconds": time.perf_counter() - began,
    }


def build(settings: Settings, variant: Variant, seed: int) -> Objective:
    """The objective around a model with the initial weights of ``seed``."""

    def plain() -> Objective:
        model = ModelConfig(
            kind="c2i_deco" if variant.decoder_width else "c2i_baseline",
            dim=settings.dim,
            num_heads=settings.num_heads,
            num_blocks=settings.num_blocks + variant.more_blocks,
            patch_size=settings.patch_size,
            decoder_width=variant.decoder_width,
            decoder_blocks=variant.decoder_blocks,
            num_classes=CLASSES,
        )
        cfg = ObjectiveConfig(
            freq_weight=variant.freq_weight,
            repa_weight=0.0,
            condition_dropout=settings.condition_dropout,
            prediction=variant.prediction,
        )
        return Objective(Denoiser(model), cfg, encoder_dim=0)

    objective = plain()
    with torch.device("meta"):
        template = plain()
    objective.load_state_dict(dict(initial_tensors(template, seed)))
    return objective


def train_variant(
    objective: Objective, dataset: LabelledImages, settings: Settings, seed: int
) -> tuple[AdamWWithEMA, list[float]]:
    """Train in place; returns the optimizer, which holds the EMA, and each step's flow loss."""
    cfg = OptimizerConfig(ema_decay=settings.ema_decay)
    optimizer = AdamWWithEMA(objective.parameters(), cfg, kernels="torch")
    parameters = dict(objective.named_parameters())
    optimizer.track(parameters, ema=parameters)
    null = torch.tensor(CLASSES)
    device = torch.device("cpu")
    prepare = InputBuilder(seed=seed, device=device, objective=objective.cfg, null=null, num_classes=CLASSES)
    losses = []
    for step, images, labels in _batches(dataset, settings, seed=seed, steps=settings.steps):
        numbers = list(range(step * settings.batch, (step + 1) * settings.batch))
        batch = Batch(images, [], [int(label) for label in labels], numbers, None)
        found = objective(*prepare(batch, 1.0))
        found["loss"].backward()
        optimizer.begin(lr=settings.lr, betas=(0.9, 0.95), measure_norm=True)
        optimizer.step()
        assert optimizer.skipped is not None
        optimizer.end(optimizer.skipped)
        optimizer.zero_grad()
        losses.append(found["loss_flow"].item())
    return optimizer, losses


def draw_samples(velocity: VelocityFn, settings: Settings, seed: int) -> LabelledImages:
    """Equally many samples of every class by Euler steps without guidance, as uint8."""
    labels = np.arange(settings.samples_per_class * CLASSES) % CLASSES
    cfg = SamplerConfig(solver="euler", num_steps=settings.sampler_steps, guidance=1.0, timestep_shift=1.0)
    parts = []
    for start in range(0, len(labels), 100):
        condition = torch.from_numpy(labels[start : start + 100])
        seeds = [seed * 1_000_000 + start + i for i in range(len(condition))]
        noise = seeded_noise(seeds, (3, settings.side, settings.side))
        parts.append(to_uint8(sample(velocity, noise, condition, condition, cfg)))
    return LabelledImages(np.concatenate(parts), labels)


def velocity_error(velocity: VelocityFn, dataset: LabelledImages, settings: Settings) -> float:
    """Mean squared error of the velocity x - eps at times spread evenly, with the same noise for all cells."""
    image, errors = _as_input(dataset.images), []
    times = (torch.arange(len(image)) + 0.5) / len(image) * LAST_TIME
    # Classes come in turn: without another order each would meet times of its own.
    times = times[torch.randperm(len(times), generator=torch.Generator().manual_seed(0))]
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(1))
    for start in range(0, len(image), 100):
        cut = slice(start, start + 100)
        x_t, labels = noised(image[cut], noise[cut], times[cut]), torch.from_numpy(dataset.labels[cut])
        error = velocity(x_t, times[cut], labels) - (image[cut] - noise[cut])
        errors.append(error.square().mean((1, 2, 3)))
    return torch.cat(errors).mean().item()


@torch.no_grad()
def measure(classifier: Classifier, dataset: LabelledImages) -> tuple[Gaussian, float]:
    """The features' distribution, and the share of images that the classifier gives to their class."""
    moments, right = Moments(FEATURES), 0
    for start in range(0, len(dataset.labels), 250):
        logits, features = classifier(_as_input(dataset.images[start : start + 250]))
        moments.add(features)
        right += int((logits.argmax(1).numpy() == dataset.labels[start : start + 250]).sum())
    return moments.gaussian(), right / len(dataset.labels)
