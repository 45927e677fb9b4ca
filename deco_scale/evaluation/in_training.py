"""Evaluation during training: every rank generates and scores its share, rank 0 writes the image grid.

Independent of process groups, configuration files and the training loop: the caller passes a function that
generates images, its share's rank, and collectives over the shares. Under tensor parallelism the ranks of a tp
group generate one share together, and only one of them scores it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deco_scale.errors import ConfigError, RunError
from deco_scale.evaluation.clip_score import ClipScorer
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.evaluation.fid import ImageSums, Reference, frechet_distance, read_reference
from deco_scale.evaluation.inception import Inception, load_inception
from deco_scale.evaluation.npz import write_images
from deco_scale.sampling.generate import GenerateFn, SampleRequest
from deco_scale.sampling.images import save_grid
from deco_scale.sampling.output_dir import encode_npy, write_file
from deco_scale.sampling.prompts import read_prompts

_CPU = torch.device("cpu")

AllReduceFn = Callable[[Tensor], Tensor]
"""A float64 tensor on the CPU to its sum over all shares; a collective."""

GatherFn = Callable[[Any], Sequence[Any]]
"""A picklable object to those of all shares, by rank; a collective."""


class EvaluationImage(NamedTuple):
    """An image of the evaluation: its number, its request, and uint8 pixels (Y, X, 3)."""

    number: int
    request: SampleRequest
    pixels: Any


class EvaluationResult(NamedTuple):
    """Scalars by name (the same on every share) and the files written (rank 0 only, else None)."""

    scalars: dict[str, float]
    grid: Path | None
    npz: Path | None


def evaluation_requests(cfg: EvaluationConfig, *, num_classes: int) -> list[SampleRequest]:
    """The requests of an evaluation, the same every time; ``num_classes`` is 0 for a text model.

    Prompts or classes take turns. Noise is seeded with the index within the prompt, or for classes with the
    image's number, as in ``deco evaluate``. Raises :class:`ConfigError` for settings that do not fit the model.
    """
    conditions: Sequence[str | int]
    if num_classes:
        if cfg.prompts_file is not None:
            raise ConfigError("evaluation.prompts_file is for text models; set evaluation.classes instead")
        unknown = [c for c in cfg.classes if c >= num_classes]
        if unknown:
            raise ConfigError(
                f"evaluation.classes: {unknown[:4]}, but the model has classes 0 to {num_classes - 1}"
            )
        conditions = cfg.classes or range(num_classes)
    elif cfg.prompts_file is None or cfg.classes:
        raise ConfigError("evaluation.prompts_file is missing: a text model needs a file with one prompt per line")
    else:
        conditions = read_prompts(Path(cfg.prompts_file), "evaluation.prompts_file")
    requests = []
    for i in range(cfg.count):
        index, number = divmod(i, len(conditions))
        requests.append(SampleRequest(conditions[number], index, seed=i if num_classes else index))
    return requests


def generate_share(
    generate: GenerateFn, requests: Sequence[SampleRequest], *, rank: int, world: int
) -> list[EvaluationImage]:
    """Images of share ``rank`` of ``world``: the requests whose number modulo ``world`` is ``rank``.

    All shares generate the same number of images, and the surplus is dropped: sharded weights need every rank in
    every forward pass.
    """
    share = -(-len(requests) // world)
    numbers = [rank + k * world for k in range(share)]
    generated = generate([requests[number % len(requests)] for number in numbers])
    images = [EvaluationImage(number, *pair) for number, pair in zip(numbers, generated, strict=True)]
    return [image for image in images if image.number < len(requests)]


class Scorer:
    """The scoring models that a configuration names, loaded once and kept on the CPU between evaluations."""

    def __init__(self, cfg: EvaluationConfig, device: torch.device) -> None:
        """Raises :class:`ConfigError` if a scoring model or the reference is missing or damaged."""
        self._cfg, self._device = cfg, device
        self._inception: Inception | None = None
        self._reference: Reference | None = None
        self._clip = ClipScorer(Path(cfg.clip_folder)) if cfg.clip_folder is not None else None
        if cfg.inception_weights is not None and cfg.reference is not None:
            self._inception = load_inception(Path(cfg.inception_weights), _CPU)
            try:
                self._reference = read_reference(Path(cfg.reference), _CPU)
            except RunError as error:
                raise ConfigError(f"evaluation.reference: {error}") from error
            if self._reference is None:
                raise ConfigError(f"evaluation.reference={cfg.reference} has no mu and sigma")

    @property
    def published_weights(self) -> bool | None:
        """Whether scores are comparable with published ones; None without Inception."""
        return self._inception.published if self._inception is not None else None

    def scalars(self, share: Sequence[EvaluationImage], all_reduce: AllReduceFn) -> dict[str, float]:
        """Scores of all shares' images, the same on every share; a collective.

        ``fid``, ``sfid``, ``inception_score`` (of one split) and ``clip_score``, as configured.
        """
        scalars: dict[str, float] = {}
        batches = [share[i : i + self._cfg.batch] for i in range(0, len(share), self._cfg.batch)]
        if self._inception is not None and self._reference is not None:
            sums = ImageSums(self._inception.to(self._device), _CPU, split=self._cfg.count)
            for batch in batches:
                sums.add(np.stack([image.pixels for image in batch]))
            self._inception.to(_CPU)
            (spread,) = sums.classes.parts
            for values in (*sums.pool.sums(), *sums.spatial.sums(), *spread.sums()):
                values.copy_(all_reduce(values.clone()))
            scalars["fid"] = frechet_distance(sums.pool.gaussian(), self._reference.pool)
            scalars["inception_score"] = sums.classes.score()
            if self._reference.spatial is not None:
                scalars["sfid"] = frechet_distance(sums.spatial.gaussian(), self._reference.spatial)
        if self._clip is not None:
            total = torch.zeros(2, dtype=torch.float64)
            self._clip.to(self._device)
            for batch in batches:
                scores = self._clip.scores(
                    [image.pixels for image in batch], [str(image.request.condition) for image in batch]
                )
                total += torch.tensor([scores.double().sum(), len(batch)])
            self._clip.to(_CPU)
            score, count = all_reduce(total).tolist()
            scalars["clip_score"] = score / count
        return scalars


def evaluate_share(
    cfg: EvaluationConfig,
    share: Sequence[EvaluationImage],
    scorer: Scorer,
    *,
    rank: int,
    folder: Path,
    step: int,
    all_reduce: AllReduceFn,
    gather: GatherFn,
) -> EvaluationResult:
    """Score and save the images of :func:`generate_share`; every share calls this with its own ``rank``.

    Writes ``step_XXXXXXXX.png`` and, if ``cfg.npz`` is set, ``step_XXXXXXXX.npz`` to ``folder``, which then must
    be on a disk that all ranks share. Raises :class:`RunError` on all ranks if a share cannot write its images,
    and on rank 0 if the joined files cannot be written.
    """
    scalars = scorer.scalars(share, all_reduce)
    shown = [image for part in gather([image for image in share if image.number < cfg.grid]) for image in part]
    if cfg.npz:
        # The images are joined only after every share has written its own, or failed.
        errors = [error for error in gather(save_share(share, folder, step)) if error is not None]
        if errors:
            raise RunError(errors[0])
    if rank != 0:
        return EvaluationResult(scalars, None, None)
    npz = join_images(cfg.count, folder, step) if cfg.npz else None
    shown.sort(key=lambda image: image.number)
    grid, labels = folder / f"step_{step:08d}.png", [str(image.request.condition) for image in shown]
    save_grid([image.pixels for image in shown], grid, labels=labels)
    return EvaluationResult(scalars, grid, npz)


def save_share(share: Sequence[EvaluationImage], folder: Path, step: int) -> str | None:
    """Write a share's images for :func:`join_images`; returns the error's message if the disk refuses."""
    try:
        for image in share:
            write_file(_image_path(folder, step, image.number), encode_npy(image.pixels))
    except RunError as error:
        return str(error)
    return None


def join_images(count: int, folder: Path, step: int) -> Path:
    """``step_XXXXXXXX.npz`` of ``count`` images that all shares wrote, in order; rank 0 only.

    Raises :class:`RunError` if an image is missing: the folder must be on a disk that all ranks share.
    """
    paths = [_image_path(folder, step, number) for number in range(count)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise RunError(f"{missing[0]} is missing: {folder} must be on a disk that all ranks share")
    shape = np.load(paths[0], allow_pickle=False).shape
    out = folder / f"step_{step:08d}.npz"
    write_images(out, (count, *shape), (np.load(path, allow_pickle=False)[None] for path in paths))
    for path in paths:
        path.unlink()
    return out


def _image_path(folder: Path, step: int, number: int) -> Path:
    return folder / f".step_{step:08d}_{number:06d}.npy"
