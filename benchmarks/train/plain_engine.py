"""An engine without sharding: the objective on one device, with the optimizer of the engines.

It measures what a step costs without FSDP or ZeRO. The weights are initialised on the device; the engines'
initialisation, which is the same for any number of ranks, takes about 8 s of one CPU core for the XXL model.
"""

from collections.abc import Callable, Sequence

import torch
import torch._dynamo
from torch import Tensor, nn

from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.kernels.select import Kernels
from deco_scale.models.compile import compile_modules
from deco_scale.objectives import Objective
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.adamw_ema import AdamWWithEMA, nan_if_nonfinite
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import EMA_PREFIX, Update
from deco_scale.parallel.sequence_parallel import TokenShard
from deco_scale.precision import fp8
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.precision.fp8_plan import Fp8Plan, check_plan
from launcher.build.model import choose_compile


class PlainEngine:
    """Forward, backward and update as :func:`deco_scale.training.train_step.train_step` calls them; no saving."""

    def __init__(
        self,
        objective: Objective,
        optimizer: OptimizerConfig,
        precision: PrecisionConfig,
        device: torch.device,
        *,
        kernels: Kernels,
        fp8_plan: Fp8Plan | None = None,
    ) -> None:
        self.objective = objective
        self._device, self._precision, self._fp8_plan = device, precision, fp8_plan
        self._compiled = False
        parameters = dict(objective.named_parameters())
        self.optimizer = AdamWWithEMA(parameters.values(), optimizer, kernels=kernels)
        self.optimizer.track(parameters, ema={name for name in parameters if name.startswith(EMA_PREFIX)})

    def compile(self, enabled: bool) -> None:
        """Compile the units that the engines compile, from their next call on, or run them eagerly."""
        if enabled and self._compiled:
            return
        self._compiled = enabled
        torch._dynamo.reset()
        for unit in self.objective.denoiser.units:
            unit.__dict__.pop("forward", None)
        if enabled:
            compile_modules(self.objective.denoiser.units, fall_back=False)

    @property
    def tokens(self) -> TokenShard | None:
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.objective.denoiser.transformer_blocks

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        with autocast(self._precision, self._device), fp8.fp8_context(self._fp8_plan):
            losses = self.objective(*inputs)
        self.backward(nan_if_nonfinite(losses["loss"] * scale))
        return {name: value.detach() for name, value in losses.items()}

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def grad_norm(self) -> Tensor:
        return nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])

    @torch.no_grad()
    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        norm = self.grad_norm()
        self.optimizer.begin(lr=lr, betas=betas, norm=norm, should_skip=should_skip)
        self.optimizer.step()
        self.objective.zero_grad()
        assert self.optimizer.skipped is not None
        self.optimizer.end(self.optimizer.skipped)
        return Update(norm, self.optimizer.skipped)


def build_plain_engine(
    build: Callable[[], Objective],
    cfg: RunConfig,
    device: torch.device,
    *,
    kernels: Kernels,
    fp8_plan: Fp8Plan | None,
) -> PlainEngine:
    """A :class:`PlainEngine` on random weights drawn on ``device``, compiled where ``cfg`` asks for it.

    Raises :class:`ConfigError` for activation checkpointing and FP8 plans that the configuration does not fit.
    """
    if cfg.parallel.activation_checkpointing != "none":
        raise ConfigError("without an engine there is no activation checkpointing")
    check_plan(cfg.precision, fp8_plan)
    with torch.device("meta"):
        objective = build()
    if fp8_plan is not None:
        fp8.apply_fp8(objective.denoiser, fp8_plan)
    objective.to_empty(device=device)
    torch.manual_seed(cfg.run.seed)
    with torch.device(device), torch.no_grad():
        template = build()
        for module in reversed(list(template.modules())):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        values = dict(template.named_parameters())
        for name, parameter in objective.named_parameters():
            parameter.copy_(values[name])
    engine = PlainEngine(objective, cfg.optimizer, cfg.precision, device, kernels=kernels, fp8_plan=fp8_plan)
    engine.compile(choose_compile(cfg, device)[0])
    return engine
