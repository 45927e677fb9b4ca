"""FID, sFID, Inception score, precision and recall of a file of images against a reference, as in the ADM suite.

A reference has images (``arr_0``), statistics (``mu``, ``sigma`` and for sFID ``mu_s``, ``sigma_s``), or both: in
the ADM suite's reference batches, statistics are of the full training set, images for precision and recall. Scores
are computed in float64, batch by batch.

Shape letters: N features of a set, F their width, K classes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.evaluation.inception import NUM_CLASSES, POOL_DIM, SPATIAL_DIM, Inception
from deco_scale.evaluation.npz import IMAGES_KEY, array_names, images_shape, read_floats, read_images

SPLIT = 5000
"""Images per split of the Inception score, as in the ADM suite."""


class Gaussian(NamedTuple):
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

    def __init__(self, classes: int, *, split: int = SPLIT, device: torch.device | None = None) -> None:
        self._new_part, self._split = partial(ClassSpread, classes, device), split
        self.parts = [self._new_part()]

    def add(self, logits_NK: Tensor) -> None:
        """Add the logits of the next images."""
        while len(logits_NK):
            if self.parts[-1].count == self._split:
                self.parts.append(self._new_part())
            room = self._split - int(self.parts[-1].count)
            self.parts[-1].add(logits_NK[:room])
            logits_NK = logits_NK[room:]

    def score(self) -> float:
        """Mean over the splits; nan without any image."""
        return sum(part.score() for part in self.parts) / len(self.parts)


class ImageSums:
    """Sums over images for FID, sFID and Inception score; those of several processes may be added."""

    def __init__(self, inception: Inception, device: torch.device, *, split: int = SPLIT) -> None:
        self._inception = inception
        self.pool, self.spatial = Moments(POOL_DIM, device), Moments(SPATIAL_DIM, device)
        self.classes = InceptionScore(NUM_CLASSES, split=split, device=device)

    def add(self, images_BYXC: Any) -> Tensor:
        """Add a batch of uint8 images (B, Y, X, 3); returns their pool features (B, 2048)."""
        features = self._inception(torch.tensor(images_BYXC))
        self.pool.add(features.pool_BF)
        self.spatial.add(features.spatial_BF)
        self.classes.add(self._inception.class_scores(features.pool_BF))
        return features.pool_BF


def precision_recall(
    samples_NF: Tensor, reference_NF: Tensor, *, neighbours: int = 3, block: int = 4096
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its features that reach to the ``neighbours``-th nearest of
    the same set. Precision is the share of samples within the reference's manifold, recall the share of the
    reference within the samples'. Distances of ``block`` features are in memory at a time. Raises
    ``ValueError`` for sets that are too small. The ADM suite rounds features to half precision here, so its
    last digits may differ.
    """
    for name, features in (("samples", samples_NF), ("reference", reference_NF)):
        if len(features) <= neighbours:
            raise ValueError(f"{len(features)} {name} are too few for {neighbours} neighbours each")
    # Centred, the differences of large squares below lose fewer digits.
    centre = reference_NF.mean(dim=0)
    samples, reference = samples_NF - centre, reference_NF - centre
    return _inside(samples, reference, neighbours, block), _inside(reference, samples, neighbours, block)


def _inside(queries_NF: Tensor, centres_MF: Tensor, neighbours: int, block: int) -> float:
    """Share of the queries in the union of balls around the centres."""
    # Each centre is its own nearest one.
    nearest = [rows.topk(neighbours + 1, largest=False) for rows in _distances(centres_MF, centres_MF, block)]
    radii_M = torch.cat([found.values[:, neighbours] for found in nearest])
    inside = [int((rows <= radii_M).any(dim=1).sum()) for rows in _distances(queries_NF, centres_MF, block)]
    return sum(inside) / len(queries_NF)


def _distances(a_NF: Tensor, b_MF: Tensor, block: int) -> Iterator[Tensor]:
    """Squared distances (rows, M), ``block`` rows at a time."""
    for rows in a_NF.split(block):
        tiles = []
        for columns in b_MF.split(block):
            squares = rows.square().sum(dim=1)[:, None] + columns.square().sum(dim=1)
            tiles.append(torch.addmm(squares, rows, columns.T, alpha=-2).clamp(min=0))
        yield torch.cat(tiles, dim=1)


class Reference(NamedTuple):
    """Statistics that images are compared with; ``spatial`` is None if those of sFID are unknown."""

    pool: Gaussian
    spatial: Gaussian | None


@dataclass(frozen=True)
class Scores:
    """Scores of ``num_images`` images; None if the reference has not the data for one."""

    num_images: int
    fid: float
    sfid: float | None
    inception_score: float
    precision: float | None
    recall: float | None


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
    device = inception.fc.weight.device

    def read_features(path: Path) -> tuple[ImageSums, Tensor]:
        sums, features = ImageSums(inception, device), []
        for images in read_images(path, batch):
            features.append(sums.add(images))
            on_batch(len(images))
        return sums, torch.cat(features)

    known = read_reference(reference, device)
    sums, features = read_features(samples)
    precision = recall = None
    if IMAGES_KEY in array_names(reference):
        reference_sums, reference_features = read_features(reference)
        known = known or Reference(reference_sums.pool.gaussian(), reference_sums.spatial.gaussian())
        # Three neighbours and the image itself.
        if min(len(features), len(reference_features)) > 3:
            precision, recall = precision_recall(features, reference_features)
    assert known is not None
    return Scores(
        num_images=len(features),
        fid=frechet_distance(sums.pool.gaussian(), known.pool),
        sfid=frechet_distance(sums.spatial.gaussian(), known.spatial) if known.spatial else None,
        inception_score=sums.classes.score(),
        precision=precision,
        recall=recall,
    )
