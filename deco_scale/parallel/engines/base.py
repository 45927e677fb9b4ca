"""The interface between training and a sharded model; ``fsdp`` and ``deepspeed`` implement it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deco_scale.distributed.replica_check import Replicas
from deco_scale.kernels.select import Kernels
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.objectives import Objective
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.adamw_ema import AdamWWithEMA
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.config import ReduceDtype, ZeroStage
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.precision.fp8_plan import Fp8Plan, check_plan

EMA_PREFIX = "denoiser."
"""The EMA covers the denoiser, as in the release; the REPA head is of no use after training."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine is built by; ``fp8_plan`` goes with ``compute: fp8``, the last three are for DeepSpeed.

    ``compile_fallback``: blocks that cannot be compiled run eagerly, with a warning.
    ``reshard_after_forward`` False keeps weights gathered from a step's first use of them to its update;
    ``reduce_dtype`` is that of fsdp's gradients.
    """

    dims: ParallelDims
    device: torch.device
    optimizer: OptimizerConfig
    precision: PrecisionConfig
    seed: int = 0
    compile_blocks: bool = False
    compile_fallback: bool = False
    activation_checkpointing: ActivationCheckpointing = "none"
    fp8_plan: Fp8Plan | None = None
    kernels: Kernels = "torch"
    reshard_after_forward: bool = True
    reduce_dtype: ReduceDtype = "fp32"
    zero_stage: ZeroStage = 3
    micro_batch: int = 1
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_plan(self.precision, self.fp8_plan)


class Update(NamedTuple):
    """Outcome of an optimizer step: gradient norm before clipping, and 1.0 where it was skipped (both 0-dim)."""

    grad_norm: Tensor
    skipped: Tensor


class Engine(ABC):
    """A sharded objective with its optimizer and EMA.

    State tensors carry canonical names: ``model.<name>``, ``ema.<name>``, ``exp_avg.<name>``,
    ``exp_avg_sq.<name>`` with the names and shapes of the single-device objective, all fp32.
    """

    settings: EngineSettings
    tokens: TokenShard | None
    """Ranks that share each sequence; None without tensor parallelism."""
    _objective: Objective
    _optimizer: AdamWWithEMA

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Transformer blocks as they compute here."""
        return self._objective.denoiser.transformer_blocks

    @property
    def optimizer_steps(self) -> int:
        """Updates so far, without the skipped ones."""
        return self._optimizer.steps

    @abstractmethod
    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        """Losses of one micro-batch (detached, this rank's); accumulates ``scale`` times the gradient.

        ``last`` marks the last micro-batch of a step.
        """

    @abstractmethod
    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        """Clip gradients and update weights and EMA.

        Every rank skips the update if a loss or gradient is not finite, or ``should_skip`` (0-dim, the same on
        all ranks) is 1.0.
        """

    @abstractmethod
    def replicas(self) -> Sequence[Replicas]:
        """Live tensors that other ranks hold as well, for the same kinds of groups on every rank."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Sharded state tensors, possibly live ones; a collective."""

    @abstractmethod
    def load(self, state: dict[str, Tensor], optimizer_steps: int) -> None:
        """Take over the tensors of :meth:`state` after they were filled; may empty the dict; a collective."""

    @abstractmethod
    def ema_weights(self) -> AbstractContextManager[None]:
        """Context in which the model computes with the EMA weights; a collective."""

    @torch.no_grad()
    def predict(self, patches: Tensor, t: Tensor, condition: Tensor, grid: tuple[int, int]) -> Tensor:
        """The denoiser's prediction (B, N, K) without gradients, for all tokens; a collective."""
        with autocast(self.settings.precision, self.settings.device):
            prediction = self._objective.predict(patches, t, condition, grid)
        return self.tokens.gather(prediction, patches.shape[1]) if self.tokens else prediction

    def _whole(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each tp rank has its tokens' part of a loss; times tp, the mean over all ranks is the loss."""
        return {name: value.detach() * self.settings.dims.tp for name, value in losses.items()}
