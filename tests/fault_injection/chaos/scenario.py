"""What the chaos test's job is and which faults it meets: two sizes, and the order drawn from a seed."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tests.fault_injection.chaos.faults import KINDS, Moment


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A job and the faults that it meets; ``faults`` gives the moments of each kind, ``nans`` how many steps."""

    processes: int
    steps: tuple[int, int]
    every: int
    faults: Mapping[str, Sequence[Moment]]
    nans: int
    timeout_s: float
    slow_timeout_s: float

    @property
    def total_steps(self) -> int:
        return sum(self.steps)

    @property
    def count(self) -> int:
        return sum(len(moments) for moments in self.faults.values()) + self.nans


LONG = Scenario(
    processes=2,
    steps=(300, 100),
    every=10,
    faults={
        "SIGKILL of a rank": ("step", "step", "save", "save", "start"),
        "SIGSTOP of a rank": ("step", "step", "save"),
        "SIGTERM of the job": ("step", "step", "start"),
        "S3 server killed": ("step", "step", "start"),
        "network cut": ("step", "save"),
        "network cut for a moment": ("step",),
        "disk full during a save": ("save", "save"),
        "newest checkpoint damaged": ("step", "step", "step"),
    },
    nans=3,
    timeout_s=8.0,
    slow_timeout_s=60.0,
)
SHORT = Scenario(
    processes=1,
    steps=(30, 10),
    every=4,
    faults={
        "SIGSTOP of a rank": ("step",),
        "SIGTERM of the job": ("step",),
        # After a SIGKILL in a save.
        "newest checkpoint damaged": ("save",),
    },
    nans=1,
    timeout_s=5.0,
    slow_timeout_s=60.0,
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    kind: str
    moment: Moment
    step: int
    """It waits until so many steps are done."""


def make_plan(scenario: Scenario, kinds: Sequence[str], chance: random.Random) -> list[Planned]:
    """The faults in order. One that strikes a start follows one that ends an attempt."""
    drawn = [(kind, moment) for kind in kinds for moment in scenario.faults.get(kind, ())]
    running = [each for each in drawn if each[1] != "start"]
    chance.shuffle(running)
    first, last = scenario.every // 2, scenario.total_steps - 2 * scenario.every
    steps = sorted(chance.sample(range(first, last), len(running)))
    plan = [Planned(kind=k, moment=m, step=s) for (k, m), s in zip(running, steps, strict=True)]
    for kind, moment in (each for each in drawn if each[1] == "start"):
        places = [i for i, one in enumerate(plan) if KINDS[one.kind].ends and one.moment != "start"]
        at = chance.choice(places)
        plan.insert(at + 1, Planned(kind=kind, moment=moment, step=plan[at].step))
    return plan


def make_nans(scenario: Scenario, chance: random.Random, ranks: int) -> dict[int, int]:
    """Steps with a NaN, and the rank whose gradient has it."""
    steps = chance.sample(range(3, scenario.total_steps - 2), scenario.nans)
    return {step: chance.randrange(ranks) for step in sorted(steps)}
