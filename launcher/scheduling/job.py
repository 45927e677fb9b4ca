"""What is asked of a cluster, checked before anything is written."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deco_scale.config import RunConfig, load_config
from deco_scale.errors import ConfigError
from deco_scale.parallel.layout import Layout, accumulation_steps, resolve_layout
from deco_scale.parallel.plan import check_tp
from launcher.scheduling.credentials import refuse_secret

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET_ELSEWHERE = "name it without a value (--env NAME): then only a reference is written"


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A training job.

    ``processes`` run on each node, with a GPU each unless ``gpus`` is False. ``literals`` are environment
    variables written out; ``references`` are those whose values come from elsewhere. ``grace_s``: seconds between
    the request to stop and the end. ``max_restarts`` bounds restarts after crashes. ``entry`` holds
    ``launcher/train.py`` and ``launcher/preflight.py``.
    """

    name: str
    config: str
    overrides: tuple[str, ...]
    nodes: int
    processes: int
    gpus: bool
    entry: str
    python: str
    preflight: bool = True
    literals: tuple[tuple[str, str], ...] = ()
    references: tuple[str, ...] = ()
    grace_s: int = 120
    max_restarts: int = 10

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.processes < 1:
            raise ConfigError(f"--nodes {self.nodes} and --gpus-per-node {self.processes} must both be at least 1")
        if self.grace_s < 1:
            raise ConfigError(f"--grace-s {self.grace_s} must be at least 1")
        if self.max_restarts < 0:
            raise ConfigError(f"--max-restarts {self.max_restarts} must not be negative")
        for text in (self.name, self.config, self.entry, self.python, *self.overrides):
            check_text(text, what="an argument")

    def command(self, program: str) -> list[str]:
        """Words of a command line that runs ``train`` or ``preflight``."""
        return [self.python, f"{self.entry}/launcher/{program}.py", "--config", self.config, *self.overrides]


def check_text(text: str, *, what: str) -> str:
    """Raises :class:`ConfigError` where text is empty or has a line break or another control character."""
    if not text or any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise ConfigError(f"{what} {text!r} is empty or has a control character")
    return text


def check_name(text: str, pattern: str, *, option: str, allowed: str) -> str:
    """``text`` if it matches ``pattern`` as a whole; raises :class:`ConfigError` saying what is ``allowed``."""
    if not re.fullmatch(pattern, text):
        raise ConfigError(f"{option} {text!r} is not allowed; possible: {allowed}")
    return text


def read_variables(given: Sequence[str]) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """``NAME=value`` and ``NAME`` apart; raises :class:`ConfigError` for a value that looks like a secret."""
    literals: dict[str, str] = {}
    references: list[str] = []
    for entry in given:
        name, separator, value = entry.partition("=")
        # The value stays out of the message: it may be a secret.
        if not VARIABLE.fullmatch(name):
            raise ConfigError(f"--env {name!r} is no name of a variable; possible: NAME or NAME=value")
        if name in literals or name in references:
            raise ConfigError(f"--env {name} is given twice")
        if separator:
            refuse_secret(name, value, instead=_SECRET_ELSEWHERE)
            if value:
                check_text(value, what=f"--env {name}:")
            literals[name] = value
        else:
            references.append(name)
    return tuple(literals.items()), tuple(references)


def check_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides of the configuration that may be written out; raises :class:`ConfigError`."""
    for override in overrides:
        key, _, value = override.partition("=")
        refuse_secret(key, value, instead="the standard AWS and wandb variables are read from the environment")
    return tuple(overrides)


def fit(config: Path, overrides: Sequence[str], *, ranks: int) -> tuple[RunConfig, Layout, list[str]]:
    """The configuration on ``ranks`` processes, and a line about each stage.

    Raises :class:`ConfigError` where they do not fit each other.
    """
    cfg = load_config(config, overrides)
    layout = resolve_layout(cfg.parallel, ranks)
    check_tp(cfg.model, layout.tp)
    lines = [f"{ranks} ranks: dp_replicate {layout.dp_replicate} x dp_shard {layout.dp_shard} x tp {layout.tp}"]
    for stage in cfg.stages:
        steps = accumulation_steps(
            global_batch=stage.global_batch,
            micro_batch=stage.micro_batch,
            dp=layout.dp,
            where=f"stages.{stage.name}",
        )
        lines.append(
            f"stage {stage.name}: {stage.steps} steps at {stage.resolution} px, global batch "
            f"{stage.global_batch} = micro-batch {stage.micro_batch} x accumulation {steps} x dp {layout.dp}"
        )
    return cfg, layout, lines
