"""The interface between training and a sharded model; ``fsdp`` and ``deepspeed`` implement it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from deco_scale.distributed.replica_check import Replicas
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.parallel.sequence_parallel import TokenShard

EMA_PREFIX = "denoiser."
"""The EMA covers the denoiser, as in the release; the REPA head is of no use after training."""


class Update(NamedTuple):
    """Outcome of an optimizer step: gradient norm before clipping, and 1.0 where it was skipped (both 0-dim)."""

    grad_norm: Tensor
    skipped: Tensor


class Engine(Protocol):
    """A sharded objective with its optimizer and EMA.

    State tensors carry canonical names: ``model.<name>``, ``ema.<name>``, ``exp_avg.<name>``,
    ``exp_avg_sq.<name>`` with the names and shapes of the single-device objective, all fp32.
    """

    @property
    def tokens(self) -> TokenShard | None:
        """Ranks that share each sequence; None without tensor parallelism."""

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks as they compute here."""

    @property
    def optimizer_steps(self) -> int:
        """Updates so far, without the skipped ones."""

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        """Losses of one micro-batch (detached, this rank's); accumulates ``scale`` times the gradient.

        ``last`` marks the last micro-batch of a step.
        """

    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        """Clip gradients and update weights and EMA.

        Every rank skips the update if a loss or gradient is not finite, or ``should_skip`` (0-dim, the same on
        all ranks) is 1.0.
        """

    def replicas(self) -> Sequence[Replicas]:
        """Live tensors that other ranks hold as well, for the same kinds of groups on every rank."""

    def state(self) -> dict[str, Tensor]:
        """Sharded state tensors, possibly live ones; a collective."""

    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take over the tensors of :meth:`state` after they were filled; may empty the dict; a collective."""

    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the model computes with the EMA weights; a collective."""

    def predict(self, patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """The denoiser's prediction (B, N, K) without gradients, for all tokens; a collective."""
