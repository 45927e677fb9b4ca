"""Hooks for everything beside training: logs, sample images, evaluation, checks."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deco_scale.checkpoint.manager import SaveResult
    from deco_scale.training.trainer import Trainer


class Callback:
    """Methods that the trainer calls on all ranks, callback after callback; by default they do nothing.

    An error raised by a method ends the run.
    """

    def on_fit_start(self, trainer: "Trainer") -> None:
        """Everything is built; nothing has been loaded yet."""

    def on_train_start(self, trainer: "Trainer") -> None:
        """Weights and progress are restored; the first stage comes next."""

    def on_step_start(self, trainer: "Trainer", step: int) -> None:
        """Before update ``step`` (from 1) takes its data; not part of the step's time."""

    def on_update_end(self, trainer: "Trainer", step: int) -> None:
        """After update ``step`` (from 1) and its metrics; part of the step's time, as checks of each step are."""

    def on_step_end(self, trainer: "Trainer", step: int) -> None:
        """After :meth:`on_update_end`, before a checkpoint; not part of the step's time."""

    def on_log(self, trainer: "Trainer", metrics: Mapping[str, Any]) -> None:
        """A logged step: the line of ``metrics.jsonl``."""

    def on_event(self, trainer: "Trainer", kind: str, fields: Mapping[str, Any]) -> None:
        """An entry for ``events.jsonl``; see :mod:`deco_scale.observability.events`."""

    def on_save(self, trainer: "Trainer", result: "SaveResult") -> None:
        """A checkpoint or export was written, or failed (``result.error``)."""

    def on_exception(self, trainer: "Trainer", error: BaseException) -> None:
        """``error`` ends the run and is raised afterwards. Other ranks may be elsewhere: no collectives here."""

    def on_train_end(self, trainer: "Trainer") -> None:
        """Training is done, or was stopped by a signal (``trainer.stopped``)."""
