"""The errors of the package; :class:`ConfigError` and :class:`RunError` carry a command's exit code."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


class ConfigError(ValueError):
    """Wrong use or configuration: nothing was started. Exit code 2."""

    exit_code = 2


@contextmanager
def as_config_error(prefix: str = "") -> Iterator[None]:
    """Turns a ``ValueError`` of what runs inside into a :class:`ConfigError` that begins with ``prefix``."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


class Damaged(ConfigError):
    """A file is not what was written: incomplete, or its checksum is another."""


class RunError(RuntimeError):
    """The run failed for a reason that has a name. Exit code 1."""

    exit_code = 1


class Stopped(Exception):
    """A signal ended the run, after a checkpoint."""


@dataclass(frozen=True, slots=True)
class ReplicaMismatch:
    """A rank that differs from the majority of its group in ``count`` tensors, of which ``first`` is the first.

    Without a majority, as between two ranks, every rank of the group is listed.
    """

    rank: int
    count: int
    first: str
    has_majority: bool


class ReplicaMismatchError(RunError):
    """Tensors that ranks replicate differ between them."""

    def __init__(self, message: str, mismatches: Sequence[ReplicaMismatch]) -> None:
        super().__init__(message)
        self.mismatches = tuple(mismatches)
