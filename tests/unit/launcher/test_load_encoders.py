"""Which encoders of a run are compiled, and for which batches."""

from pathlib import Path
from typing import Any

import pytest
import torch

from deco_scale.config import build_config
from deco_scale.models.frozen import FrozenModel
from launcher.build.data import load_encoders
from tests.support.assets import tiny_config


@pytest.mark.parametrize(
    ("text", "image", "data", "expected"),
    [
        ({}, {}, {}, {}),
        ({"compile": True}, {}, {}, {"Qwen3Model": {1, 2}}),
        ({}, {"compile": True}, {}, {"Dinov2Model": {1, 2}}),
        # It only encodes prompts of samples.
        ({"compile": True}, {}, {"text_states": "states"}, {}),
    ],
)
def test_encoders_are_compiled_for_the_micro_batches(
    text: dict[str, Any],
    image: dict[str, Any],
    data: dict[str, Any],
    expected: dict[str, set[int]],
    text_encoder: Path,
    image_encoder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled: dict[str, set[int]] = {}
    monkeypatch.setattr(
        FrozenModel, "compile", lambda self, sizes: compiled.update({type(self.module).__name__: set(sizes)})
    )
    raw = tiny_config(Path("run"), "shards", text_encoder, image_encoder)
    for name, changes in (("text_encoder", text), ("image_encoder", image), ("data", data)):
        raw[name] |= changes
    load_encoders(build_config(raw, source="test"), torch.device("cpu"), need_text=True)
    assert compiled == expected
