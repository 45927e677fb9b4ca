"""Classifier on coarse colours, which measures whether images fit their prompts."""

from typing import Any

import numpy as np


def colour_features(images: Any) -> Any:
    """Colours of a 2 x 2 grid and each channel's standard deviation, (P, 15), of uint8 images (P, Y, X, 3)."""
    count, height, width, _ = images.shape
    pixels = np.asarray(images, dtype=np.float64) / 255.0
    half_y, half_x = height // 2, width // 2
    quarters = pixels[:, : 2 * half_y, : 2 * half_x].reshape(count, 2, half_y, 2, half_x, 3)
    means = quarters.mean(axis=(2, 4)).reshape(count, -1)
    return np.concatenate([means, pixels.std(axis=(1, 2))], axis=1)


def fit_colour_classifier(images: Any, labels: Any) -> Any:
    """Nearest-centroid classifier on coarse colours: decides which images match their prompts."""
    from sklearn.neighbors import NearestCentroid
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import FunctionTransformer, StandardScaler

    steps = FunctionTransformer(colour_features), StandardScaler(), NearestCentroid()
    return make_pipeline(*steps).fit(images, labels)
