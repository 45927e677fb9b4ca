"""Scores of sets of features: Frechet distance, Inception score, precision and recall; float64, streaming.

Shape letters: N features of a set, F their width, K classes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SPLIT = 5000
"""Pictures of one split of the Inception score, as in the ADM suite."""


@dataclass(frozen=True)
class Gaussian:
    """Mean (F,) and covariance (F, F) in float64."""

    mean_F: Tensor
    covariance_FF: Tensor


class Moments:
    """Sums that mean and covariance are made of; sums of several processes may be added up."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total_F = torch.zeros(width, dtype=torch.float64, device=device)
        self.outer_FF = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, features_NF: Tensor) -> None:
        """Take in a batch of features of any floating type."""
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
    """Sums that the Inception score of one split is made of; sums of several processes may be added up."""

    def __init__(self, classes: int, device: torch.device | None = None) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.certainty = torch.zeros((), dtype=torch.float64, device=device)
        self.total_K = torch.zeros(classes, dtype=torch.float64, device=device)

    def add(self, logits_NK: Tensor) -> None:
        """Take in the logits of a batch."""
        log = logits_NK.to(self.total_K).log_softmax(dim=1)
        self.count += len(log)
        self.certainty += (log.exp() * log).sum()
        self.total_K += log.exp().sum(dim=0)

    def sums(self) -> tuple[Tensor, ...]:
        return self.count, self.certainty, self.total_K

    def score(self) -> float:
        """exp of the mean KL divergence from a picture's classes to the mean of all (Salimans et al. 2016)."""
        mean_K = self.total_K / self.count
        divergence = self.certainty / self.count - torch.special.xlogy(mean_K, mean_K).sum()
        return float(divergence.exp())


class InceptionScore:
    """Mean of the scores of consecutive splits of ``split`` pictures, the last one possibly shorter."""

    def __init__(self, classes: int, *, split: int = SPLIT) -> None:
        self._classes, self._split = classes, split
        self._parts: list[ClassSpread] = []

    def add(self, logits_NK: Tensor) -> None:
        """Take in the logits of the next pictures."""
        while len(logits_NK):
            if not self._parts or self._parts[-1].count == self._split:
                self._parts.append(ClassSpread(self._classes, logits_NK.device))
            room = self._split - int(self._parts[-1].count)
            self._parts[-1].add(logits_NK[:room])
            logits_NK = logits_NK[room:]

    def score(self) -> float:
        """Raises ``ValueError`` where nothing was taken in."""
        if not self._parts:
            raise ValueError("an Inception score needs at least one picture")
        return sum(part.score() for part in self._parts) / len(self._parts)


def precision_recall(
    samples_NF: Tensor, reference_NF: Tensor, *, neighbours: int = 3, block: int = 4096
) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    A set's manifold is the union of balls around its features that reach to the ``neighbours``-th nearest of
    the same set. Precision is the share of samples within the reference's manifold, recall the share of the
    reference within the samples'. At most ``block`` x ``block`` distances are held at a time. Raises
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
        found = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, radii in zip(centres_MF.split(block), radii_M.split(block), strict=True):
            found |= (_squared_distances(rows, columns) <= radii).any(dim=1)
        inside += int(found.sum())
    return inside / len(queries_NF)
