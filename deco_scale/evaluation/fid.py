"""FID, sFID, Inception score, precision and recall of a file of images against a reference, as in the ADM suite.

A reference has images (``arr_0``), statistics (``mu``, ``sigma`` and for sFID ``mu_s``, ``sigma_s``), or both: in
the ADM suite's reference batches, statistics are of the full training set, images for precision and recall. Scores
are computed in float64, batch by batch.

Shape letters: N features of a set, F their width, K classes.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.evaluation.inception import NUM_CLASSES, POOL_DIM, SPATIAL_DIM, Inception
from deco_scale.evaluation.npz import IMAGES_KEY, array_names, images_shape, read_floats, read_images

SPLIT = 5000
"""Images per split of the Inception score, as in the ADM suite."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) in float64."""

    mean_F: Tensor
    covariance_FF: Tensor


class Moments:
    """Sums for mean and covariance; the sums of several processes may be added."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer_FF = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features_NF: Tensor) -> None:
        """Add a batch of features of any floating type."""
        features_NF = features_NF.to(self.total_F)
        self.count += len(features_NF)
        self.total_F += features_NF.sum(dim=0)
        self.outer_FF += features_NF.T @ features_NF

    def sums(self) -> tuple[Tensor, ...]:
        """The tensors whose sums over processes describe the union of their features."""
        return self.count, self.total_F, self.outer_FF

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance; raises ``ValueError`` for fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 features, not {int(self.count)}")
        mean = self.total_F / self.count
        covariance = (self.outer_FF - torch.outer(self.total_F, mean)) / (self.count - 1)
        return Gaussian(mean, covariance)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(A) + tr(B) - 2 tr((A B)^(1/2)).

    The last trace is the sum of the square roots of the eigenvalues of A^(1/2) B A^(1/2), a symmetric matrix
    with the same ones, which stays accurate for singular covariances (fewer features than dimensions).
    """
    values, vectors = torch.linalg.eigh(a.covariance_FF)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance_FF.to(root) @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    shift = (a.mean_F - b.mean_F.to(a.mean_F)).square().sum()
    return float(shift + a.covariance_FF.trace() + b.covariance_FF.to(root).trace() - 2 * cross)


class ClassSpread:
    """Sums for the Inception score of one split; the sums of several processes may be added."""

    def __init__(self, classes: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.certainty = torch.zeros((), dtype=torch.float64, device=device)
        self.total_K = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, logits_NK: Tensor) -> None:
        """Add the logits of a batch."""
        log = logits_NK.to(self.total_K).log_softmax(dim=1)
        self.count += len(log)
        self.certainty += (log.exp() * log).sum()
        self.total_K += log.exp().sum(dim=0)

    def sums(self) -> tuple[Tensor, ...]:
        return self.count, self.certainty, self.total_K

    def score(self) -> float:
        """exp of the mean KL divergence from an image's classes to the mean of all (Salimans et al. 2016)."""
        mean_K = self.total_K / self.count
        divergence = self.certainty / self.count - torch.special.xlogy(mean_K, mean_K).sum()
        return float(divergence.exp())


class InceptionScore:
    """Mean of the scores of consecutive splits of ``split`` images, the last one possibly shorter."""

    def __init__(self, classes: int, *, split: int = SPLIT) -> None:
        self._classes, self._split = classes, split
        self._parts: list[ClassSpread] = []

    def add(self, logits_NK: Tensor) -> None:
        """Add the logits of the next images."""
        while len(logits_NK):
            if not self._parts or self._parts[-1].count == self._split:
                self._parts.append(ClassSpread(self._classes, logits_NK.device))
            room = self._split - int(self._parts[-1].count)
            self._parts[-1].add(logits_NK[:room])
            logits_NK = logits_NK[room:]

    def score(self) -> float:
        """Mean over the splits; raises ``ValueError`` without any image."""
        if not self._parts:
            raise ValueError("an Inception score needs at least one image")
        return sum(part.score() for part in self._parts) / len(self._parts)


def precision_recall(
    samples_NF: Tensor, reference_NF: Tensor, *, neighbours: int = 3, block: int = 4096
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its features that reach to the ``neighbours``-th nearest of
    the same set. Precision is the share of samples within the reference's manifold, recall the share of the
    reference within the samples'. At most ``block`` x ``block`` distances are in memory at a time. Raises
    ``ValueError`` for sets that are too small. The ADM suite rounds features to half precision here, so its
    last digits may differ.
    """
    for name, features in (("samples", samples_NF), ("reference", reference_NF)):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} {name} are too few for {neighbours} neighbours each")
    # Centred, the differences of large squares below lose fewer digits.
    centre = reference_NF.mean(dim=0)
    samples, reference = samples_NF - centre, reference_NF - centre
    precision = _inside(samples, reference, _radii(reference, neighbours, block), block)
    recall = _inside(reference, samples, _radii(samples, neighbours, block), block)
    return precision, recall


def _squared_distances(a_NF: Tensor, b_MF: Tensor) -> Tensor:
    squares = a_NF.square().sum(dim=1)[:, None] + b_MF.square().sum(dim=1)
    return torch.addmm(squares, a_NF, b_MF.T, alpha=-2).clamp(min=0)


def _radii(features_NF: Tensor, neighbours: int, block: int) -> Tensor:
    """Squared distance (N,) of each feature to its ``neighbours``-th nearest other one."""
    radii = []
    for rows in features_NF.split(block):
        nearest = rows.new_empty(len(rows), 0)
        for columns in features_NF.split(block):
            nearest = torch.cat([nearest, _squared_distances(rows, columns)], dim=1)
            # Each feature is its own nearest one.
            nearest = nearest.topk(min(neighbours + 1, nearest.shape[1]), largest=False).values
        radii.append(nearest[:, neighbours])
    return torch.cat(radii)


def _inside(queries_NF: Tensor, centres_MF: Tensor, radii_M: Tensor, block: int) -> float:
    inside = 0
    for rows in queries_NF.split(block):
        is_inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radii in zip(centres_MF.split(block), radii_M.split(block), strict=True):
            is_inside |= (_squared_distances(rows, columns) <= radii).any(dim=1)
        inside += int(is_inside.sum())
    return inside / len(queries_NF)


@dataclass(frozen=True)
class Reference:
    """Statistics that images are compared with; ``spatial`` is None if those of sFID are unknown."""

    pool: Gaussian
    spatial: Gaussian | None


@dataclass(frozen=True)
class ImageStatistics:
    """Of a set of images: moments of both kinds of features, all pool features (N, 2048), Inception score."""

    pool: Gaussian
    spatial: Gaussian
    pool_features_NF: Tensor
    inception_score: float


@dataclass(frozen=True)
class Scores:
    """Scores of ``num_images`` images; None if the reference has not the data for one."""

    num_images: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None


def image_statistics(
    inception: Inception, batches: Iterable[Any], on_batch: Callable[[int], None]
) -> ImageStatistics:
    """Run the network over uint8 batches (B, Y, X, 3); ``on_batch`` gets the size of each."""
    device = inception.fc.weight.device
    pool, spatial = Moments(POOL_DIM, device), Moments(SPATIAL_DIM, device)
    spread, pool_features = InceptionScore(NUM_CLASSES), []
    for images in batches:
        features = inception(torch.tensor(images))
        pool.add(features.pool_BF)
        spatial.add(features.spatial_BF)
        spread.add(inception.class_scores(features.pool_BF))
        pool_features.append(features.pool_BF)
        on_batch(len(images))
    return ImageStatistics(pool.gaussian(), spatial.gaussian(), torch.cat(pool_features), spread.score())


def read_reference(path: Path, device: torch.device) -> Reference | None:
    """A file's statistics, None if it has none; raises :class:`RunError` if they are damaged."""
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
        raise RunError(f"{path}: {mean} or {covariance} has values that are not finite")
    return Gaussian(mu.to(device), sigma.to(device))


def check_files(samples: Path, reference: Path) -> int:
    """Images that :func:`score_files` reads; raises :class:`RunError` for files that cannot be scored."""
    count = images_shape(samples)[0]
    if count < 2:
        raise RunError(f"{samples}: one image has no covariance")
    names = array_names(reference)
    if IMAGES_KEY in names:
        return count + images_shape(reference)[0]
    if "mu" not in names or "sigma" not in names:
        raise RunError(f"{reference} has neither {IMAGES_KEY} nor mu and sigma; it has {', '.join(names[:8])}")
    return count


def score_files(
    inception: Inception,
    samples: Path,
    reference: Path,
    *,
    batch: int = 64,
    on_batch: Callable[[int], None] = lambda size: None,
) -> Scores:
    """Scores of the images in ``samples`` against ``reference``; raises :class:`RunError` naming a bad file."""
    check_files(samples, reference)
    statistics = read_reference(reference, inception.fc.weight.device)
    sample_statistics = image_statistics(inception, read_images(samples, batch), on_batch)
    reference_images = None
    if IMAGES_KEY in array_names(reference):
        reference_images = image_statistics(inception, read_images(reference, batch), on_batch)
    if statistics is None:
        assert reference_images is not None
        statistics = Reference(reference_images.pool, reference_images.spatial)
    precision = recall = None
    features = sample_statistics.pool_features_NF
    # Three neighbours and the image itself.
    if reference_images is not None and min(len(features), len(reference_images.pool_features_NF)) > 3:
        precision, recall = precision_recall(features, reference_images.pool_features_NF)
    return Scores(
        num_images=len(features),
        fid=frechet_distance(sample_statistics.pool, statistics.pool),
        sfid=frechet_distance(sample_statistics.spatial, statistics.spatial) if statistics.spatial else None,
        inception_score=sample_statistics.inception_score,
        precision=precision,
        recall=recall,
    )
