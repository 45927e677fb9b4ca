"""Host time of a step: how long Python, autograd and the engine take to launch its operations.

A GPU is busy only while the host launches faster than it computes. What the host needs hardly depends on the size
of a micro-batch, so it is the limit where a GPU has few images. ``python -m benchmarks.host_time`` measures it on
a CPU for the XXL model's modules at a small width; the newest result file of two ranks, which shard as many do,
replaces the figures here (``--world 2``).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from deco_scale.errors import ConfigError
from deco_scale.parallel.config import ParallelConfig

HostEngine = Literal["plain", "fsdp", "zero3"]
MEASURED_BLOCKS = 20
"""Blocks of the XXL model, which the benchmark measures."""
ADDITION_S = 1e-6
"""Assumed: a small addition by PyTorch on a core of a GPU server, the unit of what is measured."""
COMPILED_SHARE = 0.5
"""Assumed: host time of compiled blocks over eager ones; few calls remain, but every kernel is still launched."""
RECOMPUTE_SHARE = {"none": 0.0, "selective": 1 / 3, "full": 1 / 3}
"""Forward passes that backward launches again, in passes of the three that a micro-batch has."""
ZERO12_SHARE = 0.25
"""Assumed: what ZeRO-1 and 2 add to the plain module, a hook for each gradient, over what ZeRO-3 adds."""
TP_SHARE = 0.3
"""Assumed: what collectives of tensor parallelism add to a module's host time."""
OPERATION_S = 5e-6
"""Assumed: one operation of a frozen encoder, which records nothing for backward, on a server's core."""


class HostTime(NamedTuple):
    """Seconds of a micro-batch and of an update."""

    micro_batch_s: float
    update_s: float


@dataclass(frozen=True, slots=True)
class HostTimes:
    """Times of each engine on a GPU server's core: one rank, eager, one thread, :data:`MEASURED_BLOCKS` blocks."""

    engines: Mapping[HostEngine, HostTime]
    source: str

    def seconds(
        self, parallel: ParallelConfig, *, ranks: int, blocks: int, compiled: bool, encoder_operations: int
    ) -> HostTime:
        """Of one micro-batch and of one update on a GPU server.

        The plain module's share shrinks with ``compiled`` blocks; what the engine adds to it does not. fsdp adds
        nothing on one rank (``ranks``: data-parallel ones); ZeRO-1 and 2 update as ZeRO-3 does.
        """
        engine: HostEngine = "fsdp" if parallel.engine == "fsdp" else "zero3"
        zero_share = 1.0 if parallel.zero_stage == 3 else ZERO12_SHARE
        share = float(ranks > 1) if engine == "fsdp" else zero_share
        plain, own = self.engines["plain"].micro_batch_s, self.engines[engine]
        module = plain * (1 + RECOMPUTE_SHARE[parallel.activation_checkpointing])
        module *= (COMPILED_SHARE if compiled else 1.0) * (1 + TP_SHARE * (parallel.tp > 1))
        added = share * max(own.micro_batch_s - plain, 0.0)
        scale = blocks / MEASURED_BLOCKS
        return HostTime((module + added) * scale + encoder_operations * OPERATION_S, own.update_s * scale)


HOST_TIMES = HostTimes(
    {"plain": HostTime(0.023, 0.008), "fsdp": HostTime(0.040, 0.005), "zero3": HostTime(0.058, 0.014)},
    "python -m benchmarks.host_time --world 2 on 2 CPU cores, 2026-11-29",
)
"""Where there is no result file."""


def read_host_times(folder: Path) -> HostTimes:
    """The newest ``host_time_2_*.json`` of ``folder``, or :data:`HOST_TIMES`.

    Raises :class:`ConfigError` naming a file that lacks what the benchmark writes.
    """
    files = sorted(folder.glob("host_time_2_*.json"))
    if not files:
        return HOST_TIMES
    try:
        medians = json.loads(files[-1].read_text(encoding="utf-8"))["medians"]
        engines: dict[HostEngine, HostTime] = {
            engine: HostTime(
                *(ADDITION_S * medians[engine][f"{name}_additions"] for name in ("micro_batch", "update"))
            )
            for engine in HOST_TIMES.engines
        }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"result file {files[-1]}: not what benchmarks.host_time writes ({error!r}); measure again"
        ) from error
    return HostTimes(engines, f"measured: {files[-1].name}")
