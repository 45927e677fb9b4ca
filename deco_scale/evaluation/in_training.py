"""Evaluation during training: every rank draws and scores its share, rank 0 has the sums and the sheet.

Nothing here knows a process group, a configuration file or the training loop: who calls gives the pictures, the
number of the share, and a function that adds tensors up over the shares. Under tensor parallelism the ranks of a
group draw one share together; only one of them goes on with it.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deco_scale.errors import ConfigError, RunError
from deco_scale.evaluation.clip_score import ClipScorer
from deco_scale.evaluation.config import EvaluationConfig
from deco_scale.evaluation.fid import Reference, read_reference
from deco_scale.evaluation.files import write_whole
from deco_scale.evaluation.imagenet import PicturesFn
from deco_scale.evaluation.inception import NUM_CLASSES, POOL_DIM, SPATIAL_DIM, Inception, load_inception
from deco_scale.evaluation.npz import write_images
from deco_scale.evaluation.statistics import ClassSpread, Moments, frechet_distance
from deco_scale.sampling.generate import SampleRequest
from deco_scale.sampling.images import save_grid

TotalFn = Callable[[Tensor], Tensor]
"""A float64 tensor on the CPU to its sum over all shares; every share calls it equally often."""


class Drawn(NamedTuple):
    """A picture of the evaluation: its number, its job, and uint8 pixels (Y, X, 3)."""

    number: int
    job: SampleRequest
    pixels: Any


GatherFn = Callable[[Any], Sequence[Any]]
"""A picklable object to those of all shares, in their order; every share calls it equally often."""


class Report(NamedTuple):
    """What one evaluation found: named scalars (the same on every share) and files (share 0 only, else None)."""

    scalars: dict[str, float]
    sheet: Path | None
    npz: Path | None


def evaluation_jobs(cfg: EvaluationConfig, *, num_classes: int) -> list[SampleRequest]:
    """The jobs of an evaluation, the same every time; ``num_classes`` 0 means a text model.

    Prompts or classes take turns. Noise is seeded with the index within the prompt, or for classes with the
    picture's number, as evaluations outside of training do. Raises :class:`ConfigError` for settings that do not
    fit the model.
    """
    if num_classes:
        if cfg.prompts_file is not None:
            raise ConfigError("evaluation.prompts_file is for text models; name classes instead")
        beyond = [c for c in cfg.classes if c >= num_classes]
        if beyond:
            raise ConfigError(
                f"evaluation.classes: {beyond[:4]}, but the model has classes 0 to {num_classes - 1}"
            )
        classes = cfg.classes or tuple(range(num_classes))
        return [SampleRequest(classes[i % len(classes)], i // len(classes), seed=i) for i in range(cfg.count)]
    if cfg.prompts_file is None or cfg.classes:
        raise ConfigError("evaluation.prompts_file is missing: a text model draws prompts, one per line of a file")
    try:
        lines = Path(cfg.prompts_file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"evaluation.prompts_file={cfg.prompts_file}: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"evaluation.prompts_file={cfg.prompts_file}: no prompt in it")
    return [
        SampleRequest(prompts[i % len(prompts)], i // len(prompts), seed=i // len(prompts))
        for i in range(cfg.count)
    ]


def draw_share(draw: PicturesFn, jobs: Sequence[SampleRequest], *, rank: int, world: int) -> list[Drawn]:
    """Share ``rank`` of ``world``: the jobs with these numbers modulo ``world``.

    All shares draw equally many, some of them in vain at the end: sharded weights need every rank in every
    forward pass.
    """
    share = -(-len(jobs) // world)
    numbers = [rank + k * world for k in range(share)]
    drawn = draw([jobs[number % len(jobs)] for number in numbers])
    found = [Drawn(number, job, pixels) for number, (job, pixels) in zip(numbers, drawn, strict=True)]
    return [picture for picture in found if picture.number < len(jobs)]


class Scorer:
    """The judges that a configuration names, loaded once and kept on the CPU between evaluations."""

    def __init__(self, cfg: EvaluationConfig, device: torch.device) -> None:
        """Raises :class:`ConfigError` for a judge or a reference that is missing or damaged."""
        self._cfg, self._device = cfg, device
        self._inception: Inception | None = None
        self._reference: Reference | None = None
        self._clip: ClipScorer | None = None
        cpu = torch.device("cpu")
        if cfg.inception_weights is not None and cfg.reference is not None:
            self._inception = load_inception(Path(cfg.inception_weights), cpu)
            try:
                self._reference = read_reference(Path(cfg.reference), cpu)
            except RunError as error:
                raise ConfigError(f"evaluation.reference: {error}") from error
            if self._reference is None:
                raise ConfigError(f"evaluation.reference={cfg.reference} has no mu and sigma to compare with")
        if cfg.clip_folder is not None:
            self._clip = ClipScorer.load(Path(cfg.clip_folder))

    @property
    def published_weights(self) -> bool | None:
        """Whether scores may be compared with published ones; None without Inception."""
        return self._inception.published if self._inception is not None else None

    def scalars(self, share: Sequence[Drawn], total: TotalFn) -> dict[str, float]:
        """Scores of all shares' pictures: ``fid``, ``sfid``, ``inception_score``, ``clip_score``, as far as named.

        The Inception score is of one split. Every share gets the same.
        """
        found: dict[str, float] = {}
        batches = [share[i : i + self._cfg.batch] for i in range(0, len(share), self._cfg.batch)]
        if self._inception is not None:
            assert self._reference is not None
            found |= self._inception_scalars(self._inception, self._reference, batches, total)
        if self._clip is not None:
            sums = torch.zeros(2, dtype=torch.float64)
            self._clip.to(self._device)
            for batch in batches:
                scores = self._clip.scores([d.pixels for d in batch], [str(d.job.condition) for d in batch])
                sums += torch.tensor([scores.double().sum(), len(batch)])
            self._clip.to(torch.device("cpu"))
            score, count = total(sums).tolist()
            found["clip_score"] = score / count
        return found

    def _inception_scalars(
        self, inception: Inception, reference: Reference, batches: Sequence[Sequence[Drawn]], total: TotalFn
    ) -> dict[str, float]:
        pool, spatial, spread = Moments(POOL_DIM), Moments(SPATIAL_DIM), ClassSpread(NUM_CLASSES)
        inception.to(self._device)
        for batch in batches:
            features = inception(torch.from_numpy(np.stack([d.pixels for d in batch])))
            pool.add(features.pool_BF.cpu())
            spatial.add(features.spatial_BF.cpu())
            spread.add(inception.class_scores(features.pool_BF).cpu())
        inception.to(torch.device("cpu"))
        for part in (pool, spatial, spread):
            for sums in part.sums():
                sums.copy_(total(sums.clone()))
        found = {
            "fid": frechet_distance(pool.gaussian(), reference.pool),
            "inception_score": spread.score(),
        }
        if reference.spatial is not None:
            found["sfid"] = frechet_distance(spatial.gaussian(), reference.spatial)
        return found


def evaluate_share(
    cfg: EvaluationConfig,
    share: Sequence[Drawn],
    scorer: Scorer,
    *,
    rank: int,
    folder: Path,
    step: int,
    total: TotalFn,
    gather: GatherFn,
) -> Report:
    """Score and keep what :func:`draw_share` drew; every share calls this, with its own ``rank``.

    Writes ``step_XXXXXXXX.png`` and, where ``cfg.npz`` is set, ``step_XXXXXXXX.npz`` to ``folder``, which then
    must lie on a disk that all ranks see. Raises :class:`RunError` on all ranks alike where a share's disk refuses
    its pictures, and on rank 0 where the files of all cannot be written.
    """
    scalars = scorer.scalars(share, total)
    first = [p for part in gather([p for p in share if p.number < cfg.grid]) for p in part]
    if cfg.npz:
        # Nobody joins files that are not written yet, and nobody waits for a share that has given up.
        problems = [problem for problem in gather(_keep_or_say(share, folder, step)) if problem is not None]
        if problems:
            raise RunError(problems[0])
    if rank != 0:
        return Report(scalars, None, None)
    return Report(scalars, save_sheet(first, folder, step), keep_all(cfg.count, folder, step) if cfg.npz else None)


def keep_share(share: Sequence[Drawn], folder: Path, step: int) -> None:
    """Write a share's pictures for :func:`keep_all`, which joins them; ``folder`` is one that all ranks see.

    Raises :class:`RunError` where the disk refuses.
    """
    for picture in share:
        buffer = io.BytesIO()
        np.save(buffer, picture.pixels, allow_pickle=False)
        write_whole(_kept(folder, step, picture.number), buffer.getvalue(), scratch=folder)


def _keep_or_say(share: Sequence[Drawn], folder: Path, step: int) -> str | None:
    """:func:`keep_share`, and its error in words where it has one."""
    try:
        keep_share(share, folder, step)
    except RunError as error:
        return str(error)
    return None


def keep_all(count: int, folder: Path, step: int) -> Path:
    """``step_XXXXXXXX.npz`` of ``count`` pictures from what all shares kept, in order; share 0 only, after all.

    Raises :class:`RunError` where a picture is not there: the folder must be on a disk that all ranks see.
    """
    paths = [_kept(folder, step, number) for number in range(count)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise RunError(f"{missing[0]} is missing: {folder} must lie on a disk that all ranks see")
    shape = np.load(paths[0], allow_pickle=False).shape
    out = folder / f"step_{step:08d}.npz"
    write_images(out, (count, *shape), (np.load(path, allow_pickle=False)[None] for path in paths))
    for path in paths:
        path.unlink()
    return out


def _kept(folder: Path, step: int, number: int) -> Path:
    return folder / f".step_{step:08d}_{number:06d}.npy"


def save_sheet(first: Sequence[Drawn], folder: Path, step: int) -> Path:
    """``step_XXXXXXXX.png`` of these pictures in the order of their numbers, with their conditions below.

    Raises :class:`RunError` where the disk refuses.
    """
    ordered = sorted(first, key=lambda picture: picture.number)
    path = folder / f"step_{step:08d}.png"
    pictures = np.stack([picture.pixels for picture in ordered])
    labels = [str(picture.job.condition) for picture in ordered]
    scale = max(1, 96 // pictures.shape[2])
    try:
        save_grid(pictures, path, columns=min(8, len(ordered)), labels=labels, scale=scale)
    except OSError as error:
        raise RunError(f"{path}: {error.strerror}") from error
    return path
