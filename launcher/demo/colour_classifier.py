"""Nearest-centroid classifier on coarse colours: tells whether the demo's images follow their prompts.

Features are the mean colours of a 2 x 2 grid and the standard deviation of each channel; centroids are
fitted on training images, features scaled by their spread there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


def colour_features(images: Any) -> Any:
    """Features (P, 15) of uint8 images (P, Y, X, 3)."""
    count, height, width, _ = images.shape
    pixels = np.asarray(images, dtype=np.float64) / 255.0
    half_y, half_x = height // 2, width // 2
    quarters = pixels[:, : 2 * half_y, : 2 * half_x].reshape(count, 2, half_y, 2, half_x, 3)
    means = quarters.mean(axis=(2, 4)).reshape(count, -1)
    return np.concatenate([means, pixels.std(axis=(1, 2))], axis=1)


@dataclass(frozen=True)
class ColourClassifier:
    """Centroids (K, F) of K classes and the scale (F,) of the features."""

    centroids: Any
    scale: Any

    @classmethod
    def fit(cls, images: Any, labels: Sequence[int]) -> "ColourClassifier":
        """Centroid of each class 0..K-1; raises ``ValueError`` for a class without images."""
        features, label = colour_features(images), np.asarray(labels)
        classes = int(label.max()) + 1
        missing = sorted(set(range(classes)) - set(label.tolist()))
        if missing:
            raise ValueError(f"no images of the classes {missing}")
        centroids = np.stack([features[label == c].mean(axis=0) for c in range(classes)])
        return cls(centroids, features.std(axis=0) + 1e-6)

    def predict(self, images: Any) -> Any:
        """Nearest class of each image."""
        difference = colour_features(images)[:, None, :] - self.centroids[None]
        return np.square(difference / self.scale).sum(axis=-1).argmin(axis=1)
