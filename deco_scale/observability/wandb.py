"""A run in wandb: one run across all attempts, and never a reason for training to stop."""

import contextlib
import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.storage.files import atomic_write, make_durable
from deco_scale.observability.config import WandbConfig
from deco_scale.observability.deadline import problem_within
from deco_scale.observability.redact import scrub_known

logger = logging.getLogger(__name__)

ID_FILE = "wandb_id"
INIT_TIMEOUT_S = 60.0
FINISH_TIMEOUT_S = 120.0


class WandbRun:
    """Logs to wandb until something there fails, which is warned of once; then it is silent.

    ``step`` is a value like the others: wandb's own count would refuse steps that are done again after a fault.
    """

    def __init__(self, folder: Path, cfg: WandbConfig, config: Mapping[str, Any]) -> None:
        self._folder = folder
        self._wandb: Any = None  # imported in an attempt, like all else
        self._run: Any = None
        self._ended = False
        self._try(lambda: self._start(cfg, config))

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        self._try(lambda: self._run.log({**values, "step": step}))

    def image(self, step: int, name: str, path: Path) -> None:
        self._try(lambda: self._run.log({name: self._wandb.Image(str(path)), "step": step}))

    def close(self) -> None:
        """Send what is left and end wandb's process, for two minutes at most: it would try without end."""
        if self._ended:
            return
        self._ended = True

        def end() -> None:
            if self._run is not None:
                self._run.finish()
            if self._wandb is not None:
                self._wandb.teardown()

        if problem := problem_within(FINISH_TIMEOUT_S, end):
            logger.warning("wandb: %s; its files are in %s", problem, self._folder / "wandb")
        _clean_logs(self._folder / "wandb")

    def _start(self, cfg: WandbConfig, config: Mapping[str, Any]) -> None:
        import wandb

        self._wandb, mode = wandb, cfg.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
        self._run = wandb.init(
            project=cfg.project,
            name=cfg.name,
            dir=self._folder,
            mode=mode,
            config=dict(config),
            id=run_id(self._folder),
            resume="allow",
            # The remote of a checkout may hold a password.
            settings=wandb.Settings(silent=True, init_timeout=INIT_TIMEOUT_S, disable_git=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _try(self, action: Callable[[], Any]) -> None:
        if self._ended:
            return
        try:
            action()
        except Exception as error:  # whatever its services and files do: training is worth more
            reason = " ".join(str(error).split())
            logger.warning("no wandb from here on: %s: %s", type(error).__name__, reason)
            self.close()


def _clean_logs(folder: Path) -> None:
    """wandb's own process writes down what servers answer, and those may repeat what they were sent."""
    for path in (path for path in folder.rglob("*.log") if not path.is_symlink()):
        with contextlib.suppress(OSError):
            text = path.read_text(encoding="utf-8", errors="surrogateescape")
            clean = scrub_known(text)
            if clean != text:
                path.write_text(clean, encoding="utf-8", errors="surrogateescape")


def run_id(folder: Path) -> str:
    """The run's name in wandb, made once and kept in ``wandb_id``; raises ``OSError``."""
    path = folder / ID_FILE
    found = path.read_text(encoding="ascii", errors="replace").strip() if path.exists() else ""
    if not re.fullmatch(r"[a-z0-9]{8,64}", found):
        found = uuid.uuid4().hex[:12]
        atomic_write(path, f"{found}\n".encode())
        make_durable(folder)
    return found
