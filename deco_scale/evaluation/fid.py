"""FID, sFID, Inception score, precision and recall of a file of pictures against a reference, as the ADM suite.

A reference has pictures (``arr_0``), statistics (``mu``, ``sigma`` and for sFID ``mu_s``, ``sigma_s``), or both,
as the ADM suite's reference batches: statistics of the whole training set, pictures for precision and recall.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.evaluation.inception import NUM_CLASSES, POOL_DIM, SPATIAL_DIM, Inception
from deco_scale.evaluation.npz import PICTURES, array_names, images_shape, read_floats, read_images
from deco_scale.evaluation.statistics import (
    Gaussian,
    InceptionScore,
    Moments,
    frechet_distance,
    precision_recall,
)


@dataclass(frozen=True)
class Reference:
    """Statistics that pictures are compared with; ``spatial`` None where sFID's are unknown."""

    pool: Gaussian
    spatial: Gaussian | None


@dataclass(frozen=True)
class Measured:
    """A set of pictures: moments of both kinds of features, all pool features (N, 2048), Inception score."""

    pool: Gaussian
    spatial: Gaussian
    pool_features_NF: Tensor
    inception_score: float


@dataclass(frozen=True)
class Scores:
    """Scores of ``pictures`` pictures; None where the reference does not allow one."""

    pictures: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None


def measure(inception: Inception, batches: Iterable[Any], on_batch: Callable[[int], None]) -> Measured:
    """Run the network over uint8 batches (B, Y, X, 3); ``on_batch`` gets the size of each."""
    device = inception.fc.weight.device
    pool, spatial = Moments(POOL_DIM, device), Moments(SPATIAL_DIM, device)
    spread, kept = InceptionScore(NUM_CLASSES), []
    for pictures in batches:
        features = inception(torch.tensor(pictures))
        pool.add(features.pool_BF)
        spatial.add(features.spatial_BF)
        spread.add(inception.class_scores(features.pool_BF))
        kept.append(features.pool_BF)
        on_batch(len(pictures))
    return Measured(pool.gaussian(), spatial.gaussian(), torch.cat(kept), spread.score())


def read_reference(path: Path, device: torch.device) -> Reference | None:
    """A file's statistics, None where it has none; raises :class:`RunError` where they are damaged."""
    names = array_names(path)
    if "mu" not in names or "sigma" not in names:
        return None
    spatial = "mu_s" in names and "sigma_s" in names
    return Reference(
        _gaussian(path, "mu", "sigma", POOL_DIM, device),
        _gaussian(path, "mu_s", "sigma_s", SPATIAL_DIM, device) if spatial else None,
    )


def _gaussian(path: Path, mean: str, covariance: str, width: int, device: torch.device) -> Gaussian:
    mu = torch.from_numpy(read_floats(path, mean, (width,)))
    sigma = torch.from_numpy(read_floats(path, covariance, (width, width)))
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise RunError(f"{path}: {mean} or {covariance} has numbers that are not finite")
    return Gaussian(mu.to(device), sigma.to(device))


def check_files(samples: Path, reference: Path) -> int:
    """Pictures that have to be looked at; raises :class:`RunError` for files that cannot be scored."""
    count = images_shape(samples)[0]
    if count < 2:
        raise RunError(f"{samples}: one picture has no covariance")
    names = array_names(reference)
    if PICTURES in names:
        return count + images_shape(reference)[0]
    if "mu" not in names or "sigma" not in names:
        raise RunError(f"{reference} has neither {PICTURES} nor mu and sigma; it has {', '.join(names[:8])}")
    return count


def score_files(
    inception: Inception,
    samples: Path,
    reference: Path,
    *,
    batch: int = 64,
    on_batch: Callable[[int], None] = lambda size: None,
) -> Scores:
    """Scores of the pictures in ``samples`` against ``reference``; raises :class:`RunError` naming a bad file."""
    check_files(samples, reference)
    known = read_reference(reference, inception.fc.weight.device)
    of_samples = measure(inception, read_images(samples, batch), on_batch)
    of_reference = None
    if PICTURES in array_names(reference):
        of_reference = measure(inception, read_images(reference, batch), on_batch)
    if known is None:
        assert of_reference is not None
        known = Reference(of_reference.pool, of_reference.spatial)
    precision = recall = None
    features = of_samples.pool_features_NF
    # Three neighbours and the picture itself.
    if of_reference is not None and min(len(features), len(of_reference.pool_features_NF)) > 3:
        precision, recall = precision_recall(features, of_reference.pool_features_NF)
    return Scores(
        pictures=len(features),
        fid=frechet_distance(of_samples.pool, known.pool),
        sfid=frechet_distance(of_samples.spatial, known.spatial) if known.spatial else None,
        inception_score=of_samples.inception_score,
        precision=precision,
        recall=recall,
    )
