"""From a batch to the objective's inputs: what is cut stays together, and each sample gets its own values."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deco_scale.errors import RunError
from deco_scale.objectives import ObjectiveConfig
from deco_scale.training.inputs import Batch, EncoderOutputs, InputBuilder, split
from tests.support import formulas

CPU = torch.device("cpu")
CLASSES = 1000


def batch_of(count: int, *, states: Any = None, first: int = 0) -> Batch:
    """Every field says which sample it belongs to."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 4, 3), np.uint8)
    return Batch(images, [f"c{i}" for i in range(count)], list(range(count)), range(first, first + count), states)


def prepare(*, null: Tensor | None = None, num_classes: int = CLASSES, **fields: Any) -> InputBuilder:
    objective = ObjectiveConfig(**{"condition_dropout": 0.0, **fields.pop("objective", {})})
    return InputBuilder(
        seed=3, device=CPU, objective=objective, num_classes=num_classes,
        null=torch.tensor(num_classes) if null is None else null, **fields,
    )  # fmt: skip


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["none", "list", "tensor"])
def test_a_micro_batch_has_every_field_of_the_same_samples(parts: int, kind: str) -> None:
    states: dict[str, Any] = {
        "none": None,
        "list": [np.full((1, 1), i, np.uint16) for i in range(6)],
        "tensor": torch.arange(6.0)[:, None, None],
    }
    cut = list(split(batch_of(6, states=states[kind], first=40), parts))
    assert len(cut) == parts
    seen: list[int] = []
    for part in cut:
        members = [number - 40 for number in part.sample_ids]
        assert list(part.labels) == members and list(part.captions) == [f"c{i}" for i in members]
        assert [int(image[0, 0, 0]) for image in part.images] == members
        if part.text_embeddings is None:
            assert kind == "none"
        else:
            assert [int(state[0, 0]) for state in part.text_embeddings] == members
        seen += members
    assert seen == list(range(6))


@pytest.mark.parametrize("label", [5, 6, 1000])
def test_a_label_that_is_no_class_is_refused(label: int) -> None:
    """Label 5 of a model with the classes 0 to 4 would be read as the null class."""
    batch = Batch(np.zeros((2, 2, 4, 3), np.uint8), ["", ""], [0, label], [0, 1], None)
    with pytest.raises(RunError, match=f"class {label}.*5 classes"):
        prepare(num_classes=5)(batch, 1.0)
    last = Batch(batch.images, batch.captions, [0, 4], batch.sample_ids, None)
    assert prepare(num_classes=5)(last, 1.0).condition.tolist() == [0, 4]


def test_images_are_scaled_to_minus_one_and_one_with_channels_first() -> None:
    images = np.zeros((1, 2, 4, 3), np.uint8)
    images[0, 0, 3, 1], images[0, 1, 0, 2] = 255, 51
    inputs = prepare()(Batch(images, [""], [0], [0], None), 1.0)
    expected = torch.full((1, 3, 2, 4), -1.0)
    expected[0, 1, 0, 3], expected[0, 2, 1, 0] = 1.0, -0.6
    torch.testing.assert_close(inputs.image, expected)


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 2.0, 4.0])
def test_times_and_noise_are_the_samples_own_and_times_are_shifted(law: str, shift: float) -> None:
    inputs = prepare(objective={"time_law": law})(batch_of(5, first=7), shift)
    for row, number in enumerate(range(7, 12)):
        normal, uniform, _, noise = formulas.sample_draws(3, number, (3, 2, 4))
        base = 1 / (1 + math.exp(-normal)) if law == "logit_normal" else uniform
        assert inputs.t[row].item() == pytest.approx(base / (base + (1 - base) * shift), rel=1e-5)
        assert torch.equal(inputs.noise[row].double(), noise)


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_follow_their_law(law: str, shift: float) -> None:
    """The largest distance between the distribution of many times and the law's own (Kolmogorov and Smirnov)."""
    count = 4000
    batch = Batch(np.zeros((count, 1, 1, 3), np.uint8), [""] * count, [0] * count, range(count), None)
    t = prepare(objective={"time_law": law})(batch, shift).t.double().sort().values
    assert t[0] > 0 and t[-1] < 1
    # P(T <= t): the shift undone, then the law.
    base = t * shift / (1 + t * (shift - 1))
    below = base if law == "uniform" else torch.special.ndtr(torch.logit(base))
    steps = torch.arange(count, dtype=torch.float64) / count
    distance = torch.maximum((below - steps).abs(), (below - steps - 1 / count).abs()).max().item()
    # 1.95 / sqrt(n) is passed once in a thousand seeds, and the seed is fixed.
    assert distance < 1.95 / math.sqrt(count)


@pytest.mark.parametrize("law", ["logit_normal", "uniform"])
def test_conditions_are_dropped_with_their_share_and_at_any_time(law: str) -> None:
    count, share = 4000, 0.3
    batch = Batch(np.zeros((count, 1, 1, 3), np.uint8), [""] * count, [7] * count, range(count), None)
    inputs = prepare(objective={"time_law": law, "condition_dropout": share})(batch, 1.0)
    dropped = inputs.condition == CLASSES
    assert bool((dropped | (inputs.condition == 7)).all())
    # Four standard deviations of a share and of a mean.
    assert dropped.double().mean().item() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / count))
    means = [inputs.t[chosen].mean().item() for chosen in (dropped, ~dropped)]
    assert means[0] == pytest.approx(means[1], abs=4 * 0.3 * math.sqrt(1 / (share * count) + 1 / count))
    for row in range(50):
        assert bool(dropped[row]) == (formulas.sample_draws(3, row, (3, 1, 1))[2] < share)


def test_a_dropped_text_is_the_null_text_and_others_stay_in_their_rows() -> None:
    null = torch.full((2, 3), -9.0)

    def encode(captions: Sequence[str]) -> Tensor:
        return torch.stack([torch.full((2, 3), float(caption[1:])) for caption in captions])

    made = prepare(null=null, encode_text=encode, objective={"condition_dropout": 0.5})
    condition = made(batch_of(16), 1.0).condition
    dropped = [formulas.sample_draws(3, number, (3, 2, 4))[2] < 0.5 for number in range(16)]
    assert {*dropped} == {True, False}
    for row, gone in enumerate(dropped):
        assert torch.equal(condition[row], null if gone else torch.full((2, 3), float(row)))


def test_what_is_encoded_already_is_not_encoded_again() -> None:
    text, features = torch.ones(2, 2, 3), torch.ones(2, 4, 5)

    def fail(*arguments: Any) -> Tensor:
        raise AssertionError("encoded twice")

    made = prepare(null=torch.zeros(2, 3), encode_text=fail, encode_image=fail)
    inputs = made(batch_of(2), 1.0, EncoderOutputs(text, features))
    assert torch.equal(inputs.condition, text) and inputs.features is features
    # States of the data come before the encoder; they are bfloat16 bits, zero behind the last token.
    bits = np.array([[1.5, -2.0, 3.0]], np.float32).view(np.uint32) >> 16
    of_data = made(
        batch_of(2, states=[bits.astype(np.uint16)] * 2), 1.0, EncoderOutputs(features=features)
    ).condition
    assert of_data.dtype == torch.float32
    assert of_data.tolist() == [[[1.5, -2.0, 3.0], [0.0, 0.0, 0.0]]] * 2
