"""Bad steps and spikes: what is left out, what is told, and what the policies do."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from deco_scale.errors import RunError
from deco_scale.training.anomalies import LAG, Anomaly, AnomalyDetector, RollbackRequested
from deco_scale.training.config import FaultsConfig

CPU = torch.device("cpu")
NAN = float("nan")


def play(
    cfg: FaultsConfig, losses: Sequence[float], *, max_bad_steps: int = 100
) -> tuple[AnomalyDetector, list[Anomaly]]:
    """Show a judge these losses; an update is left out where it says so or the loss is not finite."""
    judge = AnomalyDetector(cfg, max_bad_steps=max_bad_steps, device=CPU)
    for step, loss in enumerate(losses, start=1):
        value = torch.tensor(loss)
        should_skip = judge.should_skip(value)
        skipped = torch.tensor(float(not math.isfinite(loss)))
        if should_skip is not None:
            skipped = torch.maximum(skipped, should_skip)
        judge.add(step, loss=value, skipped=skipped)
    return judge, judge.read(everything=True)


def noisy(count: int, mean: float = 2.0) -> list[float]:
    generator = torch.Generator().manual_seed(0)
    return (mean + 0.1 * torch.randn(count, generator=generator)).tolist()


def test_spikes_are_distinguished_from_noise_and_from_nonfinite_losses() -> None:
    losses = noisy(60)
    losses[40], losses[50], losses[55] = 4.0, NAN, math.inf
    cfg = FaultsConfig(spike="skip", spike_window=20)
    judge, found = play(cfg, losses)
    assert [(one.step, one.kind) for one in found] == [(41, "spike"), (51, "skip"), (56, "skip")]
    assert judge.skipped == 3 and found[0].details == {"loss": 4.0} and found[1].details == {}
    # Before the window is full nothing is known; where spikes are ignored nothing is a spike.
    early = noisy(60)
    early[10] = 4.0
    assert play(cfg, early)[1] == []
    assert [one.kind for one in play(FaultsConfig(), losses)[1]] == ["skip", "skip"]


def test_the_limit_is_the_stated_one() -> None:
    cfg = FaultsConfig(spike="skip", spike_window=50, spike_deviations=6.0)
    losses = noisy(200)
    mean = variance = 0.0
    for count, loss in enumerate(losses):
        weight = 1 / min(count + 1, 50)
        delta = loss - mean
        mean, variance = mean + weight * delta, (1 - weight) * (variance + weight * delta * delta)
    # The plain formula gives the same limit to rounding of fp32.
    limit = mean + 6 * math.sqrt(variance)
    for factor, kinds in ((0.999, []), (1.001, ["spike"])):
        found = play(cfg, [*losses, limit * factor])[1]
        assert [one.kind for one in found if one.step == 201] == kinds


def test_spikes_do_not_raise_the_limit() -> None:
    losses = [*noisy(40), *[5.0] * 10, *noisy(5)]
    found = play(FaultsConfig(spike="skip", spike_window=20), losses)[1]
    assert [one.step for one in found] == list(range(41, 51))
    assert [one.consecutive for one in found] == list(range(1, 11))


def test_policies_skip_roll_back_or_stop() -> None:
    bad = Anomaly(7, NAN, "skip", 1)
    spike = Anomaly(9, 8.0, "spike", 1)

    def act(one: Anomaly, limit: int = 10, **policies: Any) -> None:
        judge = AnomalyDetector(FaultsConfig(**policies), max_bad_steps=limit, device=CPU)
        judge.apply_policy([one], 11, 1100)

    act(bad)
    act(spike, spike="skip", non_finite="stop")
    with pytest.raises(RunError, match="step 7.*faults.non_finite=stop"):
        act(bad, non_finite="stop")
    with pytest.raises(RunError, match="step 9: a spike of the loss to 8, and faults.spike=stop"):
        act(spike, spike="stop")
    for one, policies in ((bad, {"non_finite": "rollback"}), (spike, {"spike": "rollback"})):
        with pytest.raises(RollbackRequested) as wanted:
            act(one, **policies)
        assert (wanted.value.step, wanted.value.at_step, wanted.value.samples) == (one.step, 11, 1100)
    with pytest.raises(RunError, match="in 3 steps in a row .run.max_bad_steps=3"):
        act(Anomaly(7, NAN, "skip", 3), limit=3)


def test_what_is_read_lags_and_a_run_that_never_logs_ends_soon() -> None:
    judge = AnomalyDetector(FaultsConfig(), max_bad_steps=2, device=CPU)
    ends = None
    for step in range(1, 20):
        judge.add(step, loss=torch.tensor(1.0), skipped=torch.tensor(float(step > 5)))
        try:
            judge.apply_policy(judge.read(), step, 0)
        except RunError as error:
            ends = step
            assert "step 7" in str(error) and "2 steps in a row" in str(error)
            break
    assert ends == 7 + LAG


@pytest.mark.parametrize("change", [
    {"spike_deviations": 0.0}, {"spike_window": 1}, {"rollback_steps": 0}, {"max_rollbacks": 0},
    {"check_replicas_every": -1}, {"straggler_factor": 1.0},
])  # fmt: skip
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        FaultsConfig(**change)
