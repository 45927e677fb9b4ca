"""What companions of different ranks agree on: who is who, and the order to end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deco_scale.watchdog.decision import Kind, Report, Verdict
from deco_scale.watchdog.trainer_process import Identity

_MOST_ORPHANS = 32


@dataclass(frozen=True, slots=True)
class Member:
    """A rank, its host's name, its trainer and its companion."""

    rank: int
    host: str
    trainer: Identity
    companion: Identity

    def message(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "host": self.host,
            "trainer": self.trainer.message(),
            "companion": self.companion.message(),
        }

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Member":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        trainer, companion = Identity.parse(raw["trainer"]), Identity.parse(raw["companion"])
        return cls(int(raw["rank"]), str(raw["host"])[:255], trainer, companion)


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """End the trainer, because of ``rank`` on ``host``.

    ``orphans`` are trainers whose own companion is lost, and these companions, in case they are stopped; whoever
    is on their machine ends them. ``tell``: this companion writes the events. ``report`` is the last of that
    rank, known to the one who tells.
    """

    kind: Kind
    rank: int
    host: str
    text: str
    code: int
    orphans: tuple[Identity, ...] = ()
    tell: bool = False
    report: Report | None = None

    @classmethod
    def of(cls, verdict: Verdict, member: Member, report: Report, orphans: list[Member]) -> "Order":
        """For the one who decides and tells."""
        text = f"rank {member.rank} on {member.host} (pid {member.trainer.pid}) {verdict.how}"
        return cls(
            kind=verdict.kind,
            rank=member.rank,
            host=member.host,
            text=text[:2000],
            code=verdict.code,
            orphans=tuple(one for m in orphans[:_MOST_ORPHANS] for one in (m.trainer, m.companion)),
            tell=True,
            report=report,
        )

    def message(self) -> dict[str, Any]:
        """For the others."""
        return {
            "kind": self.kind,
            "rank": self.rank,
            "host": self.host,
            "text": self.text,
            "code": self.code,
            "orphans": [orphan.message() for orphan in self.orphans],
        }

    @classmethod
    def parse(cls, raw: Mapping[str, Any]) -> "Order":
        """Raises ``KeyError``, ``TypeError`` or ``ValueError`` where it is none."""
        kind: Kind = "hang" if raw["kind"] == "hang" else "error" if raw["kind"] == "error" else "lost"
        return cls(
            kind=kind,
            rank=int(raw["rank"]),
            host=str(raw["host"]),
            text=str(raw["text"]),
            code=int(raw["code"]),
            orphans=tuple(Identity.parse(orphan) for orphan in raw["orphans"]),
        )
