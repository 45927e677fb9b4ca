"""An engine without sharding: the objective as it is on one device, with the optimizer of the engines.

For measuring what a step costs without what FSDP or ZeRO add to it on one GPU and not on eight. The model is
initialised on its device; the engines' start, the same for any number of ranks, takes about 8 s of one CPU core
for the XXL model.
"""

from collections.abc import Callable, Sequence

import torch
import torch._dynamo
from torch import Tensor, nn

from deco_scale.config import RunConfig
from deco_scale.errors import ConfigError
from deco_scale.kernels import Kernels
from deco_scale.models.compile import limit_recompiles
from deco_scale.objectives import Objective
from deco_scale.optim.adamw_ema import AdamWWithEMA, nan_if_nonfinite
from deco_scale.parallel.engines.base import EMA_PREFIX, TokenGroup, Update
from deco_scale.precision import fp8
from deco_scale.precision.config import autocast
from deco_scale.precision.fp8_plan import Fp8Plan
from deco_scale.training.inputs import ObjectiveInputs


class PlainEngine:
    """What :func:`deco_scale.training.train_step.train_step` asks of an engine, on one device; it saves nothing.

    Raises :class:`ConfigError` for activation checkpointing and FP8 plans that the configuration does not go with.
    """

    def __init__(
        self,
        build: Callable[[], Objective],
        cfg: RunConfig,
        *,
        device: torch.device,
        kernels: Kernels,
        fp8_plan: Fp8Plan | None,
    ) -> None:
        if cfg.parallel.activation_checkpointing != "none":
            raise ConfigError("without an engine there is no activation checkpointing")
        fp8.check_plan(cfg.precision, fp8_plan)
        self._device, self._precision, self._fp8_plan = device, cfg.precision, fp8_plan
        with torch.device("meta"):
            self.objective = build()
        if fp8_plan is not None:
            fp8.apply_fp8(self.objective.denoiser, fp8_plan)
        self.objective.to_empty(device=device)
        torch.manual_seed(cfg.run.seed)
        with torch.device(device), torch.no_grad():
            template = build()
            for module in reversed(list(template.modules())):
                reset = getattr(module, "reset_parameters", None)
                if reset is not None:
                    reset()
            values = dict(template.named_parameters())
            for name, parameter in self.objective.named_parameters():
                parameter.copy_(values[name])
        del template, values
        self._compiled = False
        self.compile(cfg.compile)
        parameters = dict(self.objective.named_parameters())
        self._optimizer = AdamWWithEMA(parameters.values(), cfg.optimizer, kernels=kernels)
        self._optimizer.track(parameters, averaged={name for name in parameters if name.startswith(EMA_PREFIX)})

    def compile(self, wanted: bool) -> None:
        """Compile the units that the engines compile, from their next call on, or run them as they are."""
        if wanted and self._compiled:
            return
        self._compiled = wanted
        torch._dynamo.reset()
        if wanted:
            limit_recompiles()
        denoiser = self.objective.denoiser
        units = [*denoiser.transformer_blocks, *([denoiser.decoder] if denoiser.decoder is not None else [])]
        for unit in units:
            # What nn.Module.compile sets; there is no public way back.
            unit._compiled_call_impl = None
            if wanted:
                unit.compile()

    @property
    def tokens(self) -> TokenGroup | None:
        return None

    @property
    def blocks(self) -> Sequence[nn.Module]:
        return self.objective.denoiser.transformer_blocks

    def forward_backward(self, inputs: ObjectiveInputs, *, scale: float, last: bool) -> dict[str, Tensor]:
        with autocast(self._precision, self._device), fp8.fp8_context(self._fp8_plan):
            losses = self.objective(*inputs)
        nan_if_nonfinite(losses["loss"] * scale).backward()
        return {name: value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def update(self, *, lr: float, betas: tuple[float, float], should_skip: Tensor | None = None) -> Update:
        norm = nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])
        self._optimizer.begin(lr=lr, betas=betas, norm=norm, should_skip=should_skip)
        self._optimizer.step()
        self.objective.zero_grad()
        assert self._optimizer.skipped is not None
        self._optimizer.end(self._optimizer.skipped)
        return Update(norm, self._optimizer.skipped)
