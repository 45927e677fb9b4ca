"""What the training loop asks of an engine; ``parallel`` has the two that exist."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from deco_scale.training.inputs import ObjectiveInputs

EMA_PREFIX = "denoiser."
"""The EMA covers the denoiser, as in the release; the REPA head is of no use after training."""


class Update(NamedTuple):
    """Outcome of an optimizer step: gradient norm before clipping, and 1.0 where it was skipped."""

    grad_norm: Tensor
    skipped: Tensor


class TokenGroup(Protocol):
    """Ranks that work on the same samples, each on its own tokens."""

    @property
    def group(self) -> ProcessGroup: ...

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...


class Replicas(NamedTuple):
    """Tensors of this rank that are the same, bit by bit, on all ranks of ``group``."""

    group: ProcessGroup
    tensors: Mapping[str, Tensor]


class Engine(Protocol):
    """A sharded objective with its optimizer and EMA.

    State tensors carry canonical names: ``model.<name>``, ``ema.<name>``, ``exp_avg.<name>``,
    ``exp_avg_sq.<name>`` with the names and shapes of the single-device objective, all fp32.
    """

    @property
    def tokens(self) -> TokenGroup | None:
        """Ranks that share each sequence, where there are several."""

    @property
    def optimizer_steps(self) -> int:
        """Updates taken so far, skipped ones aside."""

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        """Losses of one micro-batch (detached, this rank's); accumulates ``scale`` times the gradient."""

    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        """Clip, check, step, average; skipped on every rank when loss or gradient is not finite.

        It is skipped, too, where ``unwanted`` (0-dim, the same on all ranks) is 1.0.
        """

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks as they compute here."""

    def replicas(self) -> Sequence[Replicas]:
        """Live tensors that other ranks hold, too; every rank lists the same groups' kinds in the same order."""

    def state(self) -> dict[str, Tensor]:
        """Sharded state tensors; may be live. All ranks call it together."""

    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take over tensors that :meth:`state` returned and someone filled; may empty it. All ranks together."""

    def ema_weights(self) -> AbstractContextManager[None]:
        """Within the context the model computes with the EMA weights. All ranks together."""

    def predict(self, patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """The denoiser's prediction without gradients; with sharded weights all ranks call together."""
