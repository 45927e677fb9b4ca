"""The training step and its engine: every micro-batch has the same weight, and losses are means."""

from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import Engine, EngineSettings, Update
from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import PrecisionConfig
from deco_scale.training.train_step import train_step
from tests.support.saving import alone


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    with alone():
        yield


class RecordingEngine:
    """An engine of one weight w with the loss x * w of a micro-batch x."""

    def __init__(self) -> None:
        self.grad, self.calls = 0.0, list[tuple[float, float, bool]]()
        self.updates: list[tuple[float, tuple[float, float], Tensor | None]] = []

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        value = cast(float, inputs)
        self.calls.append((value, scale, last))
        self.grad += scale * value
        losses = {"loss": value, "loss_flow": 10 * value, "loss_repa": 100 * value}
        return {name: torch.tensor(loss) for name, loss in losses.items()}

    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        self.updates.append((lr, betas, should_skip))
        return Update(torch.tensor(self.grad), torch.tensor(0.0 if should_skip is None else should_skip.item()))


def step(engine: RecordingEngine, values: list[float], **fields: Any) -> Any:
    micro_batches = cast(list[ObjectiveInputs], values)
    return train_step(
        cast(Engine, engine), micro_batches, num_micro_batches=len(values), lr=0.5, betas=(0.1, 0.2), **fields
    )


@pytest.mark.parametrize("values", [[4.0], [1.0, 3.0], [2.0, 4.0, 9.0, 1.0]])
def test_gradient_and_losses_are_means_over_the_micro_batches(values: list[float]) -> None:
    engine, count = RecordingEngine(), len(values)
    result = step(engine, values)
    mean = sum(values) / count
    assert result.grad_norm.item() == pytest.approx(mean)
    losses = {name: loss.item() for name, loss in result.losses.items()}
    assert losses == pytest.approx({"loss": mean, "loss_flow": 10 * mean, "loss_repa": 100 * mean})
    # In order, all with one weight, and the engine knows the last one.
    assert engine.calls == [(value, 1 / count, i == count - 1) for i, value in enumerate(values)]
    assert engine.updates == [(0.5, (0.1, 0.2), None)] and result.skipped.item() == 0


def test_the_loss_of_the_whole_step_decides_whether_it_is_skipped() -> None:
    engine, shown = RecordingEngine(), []

    def should_skip(loss: Tensor) -> Tensor:
        shown.append(loss.item())
        return torch.tensor(1.0)

    assert step(engine, [1.0, 2.0, 6.0], should_skip=should_skip).skipped.item() == 1.0
    assert shown == [3.0] and len(engine.updates) == 1


@pytest.mark.parametrize("tp", [1, 2])
def test_deepspeed_gets_the_loss_times_its_scale_and_divides_no_more(tp: int) -> None:
    class Library:
        """The calls of DeepSpeed's engine that a micro-batch makes."""

        def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
            return {"loss": inputs[0] * 1.0, "loss_flow": inputs[0] * 0.5}

        def backward(self, loss: Tensor, **options: Any) -> None:
            self.differentiated, self.options = loss, options

    engine, library = object.__new__(DeepSpeedEngine), Library()
    engine._engine, engine._stage = library, 0
    engine.settings = EngineSettings(
        zero_stage=0,
        dims=ParallelDims(1, 1, tp),
        device=torch.device("cpu"),
        optimizer=OptimizerConfig(),
        precision=PrecisionConfig(compute="fp32"),
    )
    inputs = cast(ObjectiveInputs, (torch.tensor(6.0),))
    losses = engine.forward_backward(inputs, scale=0.25, last=False)
    assert library.differentiated.item() == 1.5 and library.options == {"scale_wrt_gas": False}
    # A rank of a tp group has its part of the loss; the mean over ranks makes the whole of tp times that.
    assert {name: loss.item() for name, loss in losses.items()} == {"loss": 6.0 * tp, "loss_flow": 3.0 * tp}
