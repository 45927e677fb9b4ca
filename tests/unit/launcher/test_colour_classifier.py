"""The demo's colour classifier: separates colours, and is no better than chance on noise."""

import numpy as np

from launcher.demo.colour_classifier import fit_colour_classifier


def test_separates_colours_and_not_noise() -> None:
    random = np.random.default_rng(0)

    def draw(centres: np.ndarray, label: np.ndarray) -> np.ndarray:
        noise = random.normal(0, 25, (len(label), 16, 16, 3))
        return np.clip(centres[label][:, None, None] + noise, 0, 255).astype(np.uint8)

    label = np.arange(200) % 4
    centres = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [128, 128, 128]], dtype=float)
    classifier = fit_colour_classifier(draw(centres, label), label)
    assert (classifier.predict(draw(centres, label)) == label).mean() > 0.95
    same = np.repeat(centres[3:], 4, axis=0)
    assert (classifier.predict(draw(same, label)) == label).mean() < 0.5
