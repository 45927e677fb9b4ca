"""GenEval's overall score when tasks have different numbers of images."""

import json
from pathlib import Path

import pytest

from deco_scale.evaluation import geneval


def test_overall_score_weights_every_task_equally_however_many_images_it_has(tmp_path: Path) -> None:
    """9 of 10 and 1 of 2 and 0 of 1: the mean of the shares is 7/15, the share of all images 10/13."""
    correct = {"single_object": [True] * 9 + [False], "counting": [True, False], "position": [False]}
    lines = [
        json.dumps({"tag": tag, "correct": value, "metadata": f"{tag} {index}"})
        for tag, values in correct.items()
        for index, value in enumerate(values)
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(lines))
    summary = geneval.summarise(path)
    assert summary.overall == pytest.approx((0.9 + 0.5 + 0.0) / 3)
    assert summary.overall == pytest.approx(7 / 15)
