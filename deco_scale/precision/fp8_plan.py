"""The FP8 plan: which linears compute in FP8, decided by name and size before a model is built.

Sizes are those of a rank: local sizes of linears split over tp, tokens as gathered.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.tp_plan import Split, part_sizes, split_of
from deco_scale.precision.config import PrecisionConfig
from deco_scale.precision.recipe import Fp8Choice

DECODER_CONDITION = "decoder.cond_proj"
_KEPT = "kept in higher precision by design"


@dataclass(frozen=True, slots=True)
class BatchShape:
    """A rank's micro-batch: samples, and tokens of a sample (``text_tokens`` 0 without text)."""

    batch: int
    image_tokens: int
    text_tokens: int


@dataclass(frozen=True, slots=True)
class Fp8Linear:
    """A linear with the sizes of a rank; ``name`` is its path in the denoiser."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    split: Split


@dataclass(frozen=True, slots=True)
class Fp8Plan:
    """The linears that compute in FP8; ``rejected`` has name and reason of those whose size does not fit."""

    choice: Fp8Choice
    linears: tuple[Fp8Linear, ...]
    rejected: tuple[tuple[str, str], ...]

    def messages(self) -> list[str]:
        """Log lines: what computes in FP8, and each reason why linears stay in bf16."""
        lines = [f"FP8 ({self.choice}): {len(self.linears)} linears: {_listed([f.name for f in self.linears])}"]
        for reason in dict.fromkeys(reason for _, reason in self.rejected):
            names = [name for name, why in self.rejected if why == reason]
            lines.append(f"FP8: {len(names)} linears stay in bf16, {reason}: {_listed(names)}")
        return lines


@dataclass(frozen=True, slots=True)
class ModuleRow:
    """A row of the precision table: sizes on a rank, compute format, and why it is not FP8."""

    name: str
    in_features: int
    out_features: int
    computes: str
    why: str


def plan_fp8(
    model: ModelConfig,
    cfg: PrecisionConfig,
    choice: Fp8Choice,
    *,
    tp: int,
    batches: Sequence[BatchShape],
    recompute: ActivationCheckpointing,
    compile_blocks: bool,
) -> Fp8Plan:
    """Select the linears; ``batches`` are all micro-batch shapes of the run.

    Raises :class:`ConfigError` if no linear can compute in FP8, and for settings that do not work with Transformer
    Engine: selective checkpointing does not see its products; for compile see :func:`compile_conflict`.
    """
    if choice.backend == "te" and recompute == "selective":
        raise ConfigError(
            "parallel.activation_checkpointing=selective does not see Transformer Engine's products; "
            "possible: none, full, or precision.fp8_backend=torchao"
        )
    if compile_blocks and (conflict := compile_conflict(choice, recompute)):
        raise ConfigError(f"compile=true does not work with {conflict}, or compile=false")
    # The linears of attention and MLP, which are those that tp can split.
    candidates = [
        linear
        for linear in _linears(model, tp)
        if linear.split != "replicated" or (cfg.fp8_decoder_condition and linear.name == DECODER_CONDITION)
    ]
    misfits = {linear.name: _misfit(linear, choice, tp=tp, batches=batches) for linear in candidates}
    linears = tuple(linear for linear in candidates if not misfits[linear.name])
    if not linears:
        reasons = "; ".join(dict.fromkeys(misfits.values()))
        raise ConfigError(f"precision.compute=fp8: no linear can compute in FP8 ({reasons}); possible: bf16, fp32")
    return Fp8Plan(choice, linears, tuple((name, reason) for name, reason in misfits.items() if reason))


def compile_conflict(choice: Fp8Choice, recompute: ActivationCheckpointing) -> str | None:
    """What keeps blocks from being compiled, with the alternatives: two settings of Transformer Engine.

    Its own checkpointing, which restores FP8 in backward, is not traced, and it refuses delayed scaling in graphs.
    """
    if choice.backend != "te":
        return None
    if recompute == "full":
        return (
            "Transformer Engine and parallel.activation_checkpointing=full; "
            "possible: activation_checkpointing=none, precision.fp8_backend=torchao"
        )
    if choice.recipe == "delayed":
        return "precision.fp8_recipe=delayed; possible: auto, current, block"
    return None


def check_plan(cfg: PrecisionConfig, plan: Fp8Plan | None) -> None:
    """Raise ``ValueError`` for a plan without ``cfg.compute`` ``fp8``, or ``fp8`` without a plan."""
    if (plan is not None) != (cfg.compute == "fp8"):
        raise ValueError(f"precision.compute={cfg.compute} with {'a' if plan else 'no'} plan of FP8")


def precision_rows(
    model: ModelConfig, cfg: PrecisionConfig, plan: Fp8Plan | None, *, tp: int
) -> Iterator[ModuleRow]:
    """Compute format of each module with weights, in the model's order.

    ``plan`` is None unless ``cfg.compute`` is ``fp8``. Norms compute statistics in fp32; masters, moments, EMA and
    losses are always fp32 and not listed.
    """
    check_plan(cfg, plan)
    selected = {linear.name for linear in plan.linears} if plan else set()
    reasons = dict(plan.rejected) if plan else {}
    linears = {linear.name: linear for linear in _linears(model, tp)}
    lower = "fp32" if cfg.compute == "fp32" else "bf16"
    with torch.device("meta"):
        denoiser = Denoiser(model)
    for name, module in denoiser.named_modules():
        if linear := linears.get(name):
            computes, why = lower, ""
            if plan and name in selected:
                computes = plan.choice.formats
            elif plan:
                off = f"{_KEPT}; precision.fp8_decoder_condition=true adds it"
                why = reasons.get(name, off if name == DECODER_CONDITION else _KEPT)
            yield ModuleRow(name, linear.in_features, linear.out_features, computes, why)
        elif isinstance(module, nn.Embedding):
            yield ModuleRow(name, module.num_embeddings, module.embedding_dim, lower, _KEPT if plan else "")
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            dim = module.weight.shape[0]
            yield ModuleRow(name, dim, dim, "fp32", "norm" if plan else "")


def _linears(model: ModelConfig, tp: int) -> Iterator[Fp8Linear]:
    """Every linear of the denoiser with the sizes of a tp rank."""
    with torch.device("meta"):
        denoiser = Denoiser(model)
    for name, module in denoiser.named_modules():
        if isinstance(module, nn.Linear):
            split = split_of(f"{name}.weight")
            yield Fp8Linear(
                name,
                module.in_features // (tp if split == "row" else 1),
                module.out_features // (tp if split == "column" else 1),
                module.bias is not None,
                split,
            )


def _misfit(linear: Fp8Linear, choice: Fp8Choice, *, tp: int, batches: Sequence[BatchShape]) -> str:
    """Why FP8 cannot take it, or nothing."""
    multiple = choice.multiple
    if linear.in_features % multiple or linear.out_features % multiple:
        return f"{linear.in_features} x {linear.out_features} is not in multiples of {multiple}"
    for shape in batches:
        for tokens in _tokens(linear.name, shape, tp):
            if tokens % multiple:
                return f"a micro-batch has {tokens} tokens, not a multiple of {multiple}"
    return ""


def _tokens(name: str, shape: BatchShape, tp: int) -> list[int]:
    """Tokens that a linear sees at once; several where ranks of tp have different numbers."""
    if name == DECODER_CONDITION:
        return [shape.batch * part for part in part_sizes(shape.image_tokens, tp)]
    of_text = name.startswith("text_blocks.") or name.endswith("attn.context_kv")
    return [shape.batch * (shape.text_tokens if of_text else shape.image_tokens)]


def _listed(names: Sequence[str]) -> str:
    """Names with the numbers of blocks as ranges: ``blocks.{0-3,7}.attn.qkv``."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.fullmatch(r"((?:text_)?blocks)\.(\d+)\.(.+)", name)
        key = (match[1], match[3]) if match else (name, "")
        numbers.setdefault(key, []).extend([int(match[2])] if match else [])
    return ", ".join(f"{a}.{{{_ranges(found)}}}.{b}" if found else a for (a, b), found in numbers.items())


def _ranges(numbers: Sequence[int]) -> str:
    # Within a run of consecutive numbers, number and position differ by the same.
    grouped = itertools.groupby(enumerate(sorted(numbers)), lambda placed: placed[1] - placed[0])
    runs = [[number for _, number in run] for _, run in grouped]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
