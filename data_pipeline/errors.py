"""Errors of the data pipeline, and what a scan or a pack leaves out."""

from dataclasses import dataclass


class DataError(RuntimeError):
    """The data cannot be read or do not match the index; names the object."""


class StoreError(DataError):
    """A store refused or failed; names bucket and key, never credentials."""


@dataclass(frozen=True, slots=True)
class Reject:
    """A file, sample or shard that cannot be used, and why."""

    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
