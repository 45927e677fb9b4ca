"""What the fast model gains over its formulas written op by op, in one run; whether both give the same numbers.

``python -m benchmarks.throughput`` without a configuration runs it. Two comparisons at 256 px, batch 8, on the
same weights and inputs, a call of each in turn, medians: the pixel decoder (width 32, 3 blocks), forward and
backward; and a whole training step of a 4-block, 512-wide model: objective, backward, gradient clipping, AdamW
and EMA. Saved activations are counted by autograd's own hooks. The numbers of both are held against those of the
straightforward modules in float64: in fp32 their long sums over pixels are rounded by 1.3e-5 (gradients of the
decoder, on a CPU), more than is asked of ours. Both are timed in fp32 and differ in how they are written
(``benchmarks/train/eager_reference.py``); on a GPU ours takes the Triton kernels.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import record
from benchmarks.measure import device_name, medians_s
from benchmarks.train.eager_reference import make_reference, saved_bytes
from benchmarks.train.plain_engine import PlainEngine
from deco_scale.kernels.select import choose_kernels, use_kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import EMA_PREFIX
from deco_scale.precision.config import PrecisionConfig

NAMES = ("straightforward", "ours")
DIFFERENCE = 1e-5
"""Largest relative difference of losses and gradients; more ends the run with exit code 1."""
_LR, _BETAS = 1e-4, (0.9, 0.95)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of the comparison; the defaults are those that the promises are about."""

    side: int = 256
    batch: int = 8
    dim: int = 512
    num_heads: int = 8
    num_blocks: int = 4
    text_dim: int = 256
    text_tokens: int = 32
    encoder_dim: int = 768

    def model(self) -> ModelConfig:
        return ModelConfig(
            kind="t2i_deco",
            dim=self.dim,
            num_heads=self.num_heads,
            num_blocks=self.num_blocks,
            num_text_blocks=1,
            patch_size=16,
            decoder_width=32,
            decoder_blocks=3,
            text_dim=self.text_dim,
            text_tokens=self.text_tokens,
        )


@dataclasses.dataclass(frozen=True)
class Promise:
    """A number that was promised, and what came out; ``met`` where it is at least as good."""

    what: str
    wanted: float
    found: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


class Inputs:
    """The same random inputs for both."""

    def __init__(self, case: Case, device: torch.device) -> None:
        model, generator = case.model(), torch.Generator().manual_seed(1)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(device)

        tokens, batch = (case.side // model.patch_size) ** 2, case.batch
        self.patches, self.token = random(batch, tokens, model.patch_values), random(batch, tokens, model.dim)
        self.step = (
            random(batch, model.channels, case.side, case.side),
            random(batch, model.channels, case.side, case.side),
            torch.rand(batch, generator=generator).to(device),
            random(batch, model.text_tokens, model.text_dim),
            random(batch, tokens, case.encoder_dim),
        )


def decoder_loss(objective: Objective, inputs: Inputs) -> Tensor:
    """The decoder alone, in the precision of its weights; the tokens want a gradient as they do in a step."""
    decoder = objective.denoiser.decoder
    assert decoder is not None
    dtype = decoder.head.weight.dtype
    token = inputs.token.detach().to(dtype).requires_grad_()
    out: Tensor = decoder(inputs.patches.to(dtype), token)
    return out.square().mean()


def step_loss(objective: Objective, inputs: Inputs) -> Tensor:
    """The whole objective, in the precision of its weights."""
    dtype = objective.denoiser.patch_embed.weight.dtype
    return objective(*(x.to(dtype) for x in inputs.step))["loss"]  # type: ignore[no-any-return]


def make_objectives(case: Case, device: torch.device) -> dict[str, Objective]:
    """Both, on the same weights: normal, so that no gradient is zero as at a model's start."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = max(1, case.num_blocks // 2)
        built = Objective(Denoiser(case.model()), ObjectiveConfig(repa_layer=layer), encoder_dim=case.encoder_dim)
        for parameter in built.parameters():
            nn.init.normal_(parameter, std=0.02)
    built.to(device)
    twin = make_reference(copy.deepcopy(built))
    use_kernels(built, choose_kernels("auto", device))
    return dict(zip(NAMES, (twin, built), strict=True))


class PlainUpdate:
    """Clipping, AdamW with PyTorch's default implementation, and an EMA tensor by tensor."""

    def __init__(self, objective: nn.Module, cfg: OptimizerConfig) -> None:
        self._objective, self._cfg = objective, cfg
        self._adamw = torch.optim.AdamW(
            objective.parameters(), lr=_LR, betas=_BETAS, eps=cfg.eps, weight_decay=cfg.weight_decay
        )
        named = objective.named_parameters()
        self._pairs = [(p, p.detach().clone()) for n, p in named if n.startswith(EMA_PREFIX)]

    def __call__(self) -> None:
        nn.utils.clip_grad_norm_(self._objective.parameters(), self._cfg.clip_norm)
        self._adamw.step()
        with torch.no_grad():
            for parameter, average in self._pairs:
                average.mul_(self._cfg.ema_decay).add_(parameter, alpha=1 - self._cfg.ema_decay)


def relative_difference(found: nn.Module, wanted: nn.Module) -> float:
    """Largest ``|a - b| / |b|`` (Euclidean) over the parameters' gradients.

    Raises ``ValueError`` where only one of the two has a gradient, or it is zero.
    """
    worst = 0.0
    for (name, one), (_, other) in zip(found.named_parameters(), wanted.named_parameters(), strict=True):
        if one.grad is None and other.grad is None:
            continue
        if one.grad is None or other.grad is None or not other.grad.any():
            raise ValueError(f"{name} has no gradient to compare")
        worst = max(worst, ((one.grad - other.grad).norm() / other.grad.norm()).item())
    return worst


def compare(case: Case, device: torch.device, *, repeats: int, console: Console) -> dict[str, Any]:
    """Measure, print the table and the promises; the result's ``same_numbers`` says whether both agree."""
    inputs, objectives = Inputs(case, device), make_objectives(case, device)
    optimizer, precision = OptimizerConfig(), PrecisionConfig(compute="fp32")
    reference, ours = (objectives[name] for name in NAMES)
    engine = PlainEngine(ours, optimizer, precision, device, kernels=choose_kernels("auto", device))
    updates: dict[str, Callable[[], object]] = {
        "straightforward": PlainUpdate(reference, optimizer),
        "ours": lambda: engine.update(lr=_LR, betas=_BETAS),
    }
    nothing = dict.fromkeys(NAMES, lambda: None)
    found = {
        "decoder": _measure(objectives, functools.partial(decoder_loss, inputs=inputs), nothing, repeats, device),
        "step": _measure(objectives, functools.partial(step_loss, inputs=inputs), updates, repeats, device),
    }
    promises = [
        Promise("decoder: share of the activations kept", 0.25, 1 / _gain(found, "decoder", "bytes"),
                at_most=True),
        Promise("decoder: times as fast", 1.8, _gain(found, "decoder", "seconds")),
        Promise("training step: times as fast", 1.7, _gain(found, "step", "seconds")),
        *(Promise(f"{what}: relative difference of {kind}", DIFFERENCE, found[what][kind]["ours"], at_most=True)
          for what in found for kind in ("loss", "gradients")),
    ]  # fmt: skip
    _show(found, promises, case, console)
    return {
        **record.origin(),
        "kind": "straightforward",
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "case": dataclasses.asdict(case),
        "repeats": repeats,
        **found,
        "promises": [{**dataclasses.asdict(p), "met": p.met} for p in promises],
        "same_numbers": all(p.met for p in promises if p.wanted == DIFFERENCE),
    }


def _measure(
    objectives: dict[str, Objective],
    loss: Callable[[Objective], Tensor],
    updates: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """Differences from the straightforward modules in float64 first, on equal weights; then memory; then time."""
    exact = copy.deepcopy(objectives["straightforward"]).double()
    losses = {}
    for name, objective in (("exact", exact), *objectives.items()):
        value = loss(objective)
        value.backward()
        losses[name] = value.item()
    gradients = {name: relative_difference(objective, exact) for name, objective in objectives.items()}
    difference = {name: abs(losses[name] / losses["exact"] - 1) for name in objectives}
    del exact, objective, value
    kept = {name: saved_bytes(o, functools.partial(loss, o)) for name, o in objectives.items()}

    def step(name: str) -> None:
        objectives[name].zero_grad()
        loss(objectives[name]).backward()
        updates[name]()

    actions = {name: functools.partial(step, name) for name in NAMES}
    seconds = medians_s(actions, repeats=repeats, device=device, warmup=1)
    for name in NAMES:
        objectives[name].zero_grad()
    return {"seconds": seconds, "bytes": kept, "losses": losses, "loss": difference, "gradients": gradients}


def _gain(found: dict[str, Any], what: str, kind: str) -> float:
    values = found[what][kind]
    return float(values["straightforward"] / values["ours"])


def _show(found: dict[str, Any], promises: list[Promise], case: Case, console: Console) -> None:
    table = Table("what", *NAMES, "ratio", title=f"{case.side} px, batch {case.batch}, fp32")
    for what, label in (("decoder", "pixel decoder"), ("step", "training step")):
        seconds, kept = found[what]["seconds"], found[what]["bytes"]
        row = (f"{seconds[n]:.4g} s" for n in NAMES)
        table.add_row(f"{label}: time", *row, f"{_gain(found, what, 'seconds'):.2f}")
        row = (f"{kept[n] / 2**20:.4g} MiB" for n in NAMES)
        table.add_row(f"{label}: kept for backward", *row, f"{_gain(found, what, 'bytes'):.2f}")
        for kind in ("loss", "gradients"):
            row = (f"{found[what][kind][n]:.1e}" for n in NAMES)
            table.add_row(f"{label}: difference of {kind} from float64", *row, "")
    console.print(table)
    for promise in promises:
        word, sign = "met" if promise.met else "MISSED", "at most" if promise.at_most else "at least"
        console.print(f"{word:6} {promise.what}: {promise.found:.3g} ({sign} {promise.wanted:g})", highlight=False)
