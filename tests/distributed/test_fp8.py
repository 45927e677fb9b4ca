"""Emulated FP8 under every engine and layout: the gradients of one process, and of FP8.

Every rank of dp sees the same samples, so that scales, which go by the largest value of a micro-batch, are those
of one process. Under tp they are those of a rank's slices: there rounding differs, and must be of the same size.
"""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call

from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.models.stored_names import to_stored
from deco_scale.objectives import Objective, ObjectiveConfig
from deco_scale.objectives.objective import ObjectiveInputs
from deco_scale.optim.config import OptimizerConfig
from deco_scale.parallel.engines.base import Engine, EngineSettings
from deco_scale.parallel.mesh import ParallelDims
from deco_scale.precision.config import Compute, PrecisionConfig, autocast
from deco_scale.precision.fp8 import apply_fp8
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, plan_fp8
from deco_scale.precision.recipe import choose_fp8
from tests.support.process_groups import full_tensor, in_group

CPU = torch.device("cpu")
MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=16, decoder_width=8,
    decoder_blocks=1, text_dim=24, text_tokens=8,
)  # fmt: skip
EMULATED = PrecisionConfig(compute="fp8", fp8_emulate=True)
SAME = 2**-8
"""Relative difference of a gradient that says "the same": DeepSpeed sends gradients in bf16."""

Gradients = dict[str, Tensor]
Combination = tuple[str, int, ActivationCheckpointing]
"""Engine, tp, what is recomputed."""


def build() -> Objective:
    return Objective(Denoiser(MODEL), ObjectiveConfig(repa_weight=0.0), encoder_dim=0)


def plan(tp: int) -> Fp8Plan:
    shape = BatchShape(batch=4, image_tokens=4, text_tokens=8)
    found = plan_fp8(
        MODEL, EMULATED, choose_fp8(EMULATED, CPU), tp=tp, batches=[shape], recompute="none", compile_blocks=False
    )
    assert len(found.linears) == 14 and not found.rejected
    return found


def inputs() -> ObjectiveInputs:
    generator = torch.Generator().manual_seed(1)
    image, noise = (torch.randn(4, 3, 32, 32, generator=generator) for _ in range(2))
    return ObjectiveInputs(
        image, noise, torch.rand(4, generator=generator), torch.randn(4, 8, 24, generator=generator), None
    )


def weights() -> Gradients:
    """Values that bf16 has, so that sending them in it rounds nothing; outputs and modulations not zero."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(p.shape, generator=generator) * (0.2 if p.ndim == 1 else p.shape[-1] ** -0.5))
        .bfloat16()
        .float()
        for name, p in build().state_dict().items()
    }


def of_one_process(compute: Compute, *, all_in_bf16: bool) -> Gradients:
    """Gradients of the plain objective; ``all_in_bf16`` computes with bf16 copies of all weights, as FSDP does."""
    objective = build()
    objective.load_state_dict(weights())
    if compute == "fp8":
        apply_fp8(objective.denoiser, plan(tp=1))
    copies = {n: p.bfloat16() if all_in_bf16 else p for n, p in objective.named_parameters()}
    with autocast(PrecisionConfig(compute=compute), CPU):
        loss = functional_call(objective, copies, tuple(inputs()))["loss"]
    loss.backward()
    return to_stored({n: p.grad for n, p in objective.named_parameters() if p.grad is not None})


def of_engine(engine: Engine) -> Gradients:
    """Gradient of each parameter, read as the first moment of a step without memory."""
    values = weights()
    state = engine.state()
    assert {n.removeprefix("model.") for n in state if n.startswith("model.")} == values.keys()
    assert not [n for n in state if n.startswith("fp8.")]
    for name, value in values.items():
        target = state[f"model.{name}"]
        assert isinstance(target, DTensor) and target.dtype == torch.float32 and target.shape == value.shape
        target.to_local().copy_(distribute_tensor(value, target.device_mesh, target.placements).to_local())
    engine.load(state, 0)
    engine.forward_backward(inputs(), scale=1.0, last=True)
    engine.update(lr=0.0, betas=(0.0, 0.9))
    moments = engine.state()
    found = {}
    for name in values:
        moment = moments[f"exp_avg.{name}"]
        assert isinstance(moment, DTensor)
        found[name] = full_tensor(moment)
    return found


def engine_of(
    kind: str, tp: int, recompute: ActivationCheckpointing, *, compiled: bool = False, compute: Compute = "fp8"
) -> Engine:
    """``kind`` is ``fsdp`` or ``zero`` and a stage."""
    stage: Any = int(kind.removeprefix("zero")) if kind != "fsdp" else 3
    settings = EngineSettings(
        dims=ParallelDims(1, 2 // tp, tp), device=CPU, optimizer=OptimizerConfig(clip_norm=1e9),
        precision=PrecisionConfig(compute=compute, fp8_emulate=compute == "fp8"), compile_blocks=compiled,
        activation_checkpointing=recompute, fp8_plan=plan(tp) if compute == "fp8" else None,
        zero_stage=stage, micro_batch=4,
    )  # fmt: skip
    if kind == "fsdp":
        from deco_scale.parallel.engines.fsdp import FsdpEngine

        return FsdpEngine(build, settings)
    from deco_scale.parallel.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(build, settings)


def gap(found: Gradients, wanted: Gradients, name: str) -> float:
    """Relative difference of one parameter's gradient."""
    return ((found[name] - wanted[name]).norm() / wanted[name].norm()).item()


def error(found: Gradients, wanted: Gradients) -> float:
    """Relative, mean over the weights that multiply in FP8."""
    names = [f"denoiser.{linear.name}.weight" for linear in plan(tp=1).linears]
    return sum(gap(found, wanted, name) for name in names) / len(names)


def check(engine: Engine, label: str, one: dict[str, Gradients], *, exact: bool) -> None:
    """Against one process: the same, or (``exact=False``) other roundings that are as far from fp32."""
    found = of_engine(engine)
    of_fp8, of_this = error(one["fp8"], one["fp32"]), error(found, one["fp32"])
    assert of_fp8 > 3 * error(one["bf16"], one["fp32"]), "FP8 is not seen in the gradients"
    print(f"{label}: error {of_this:.4f}, of one process {of_fp8:.4f}, apart {error(found, one['fp8']):.4f}")
    if not exact:
        assert 0.7 * of_fp8 < of_this < 1.4 * of_fp8, f"{label}: {of_this}, one process {of_fp8}"
    for name in found:
        if exact:
            assert gap(found, one["fp8"], name) < SAME, f"{label}, {name}: {gap(found, one['fp8'], name)}"
        elif "decoder" not in name:
            # A part that is missing, or counted twice, is a gap of a half or more. The decoder's gradients are
            # small sums of large terms, and no linear of it is split.
            bound = 2 * gap(one["fp8"], one["fp32"], name) + 0.02
            assert gap(found, one["fp32"], name) < bound, f"{label}, {name}: {gap(found, one['fp32'], name)}"


FSDP: list[Combination] = [
    ("fsdp", 1, "none"),
    ("fsdp", 1, "full"),
    ("fsdp", 1, "selective"),
    ("fsdp", 2, "none"),
    ("fsdp", 2, "full"),
]
ZERO: list[Combination] = [("zero1", 1, "none"), ("zero2", 1, "full"), ("zero1", 2, "none")]
ZERO3: list[Combination] = [("zero3", 1, "none"), ("zero3", 1, "full"), ("zero3", 2, "none")]


def references(*, all_in_bf16: bool) -> dict[str, Gradients]:
    """Gradients of one process by computing format."""
    exact = of_one_process("fp32", all_in_bf16=False)
    return {"fp32": exact} | {
        name: of_one_process(name, all_in_bf16=all_in_bf16) for name in get_args(Compute) if name != "fp32"
    }


def check_all(combinations: list[Combination], *, compiled: bool) -> None:
    """Engines that share one reference."""
    one: dict[str, Gradients] = {}
    for kind, tp, recompute in combinations:
        engine = engine_of(kind, tp, recompute, compiled=compiled)
        # Behind the engine: ZeRO-3 replaces F.linear for the whole process by one that rounds before the bias.
        one = one or references(all_in_bf16=kind == "fsdp")
        label = f"{kind}, tp {tp}, {recompute}{', compiled' if compiled else ''}"
        # Compiled blocks round to bf16 in fewer places.
        check(engine, label, one, exact=tp == 1 and not compiled)


def _all_combinations() -> None:
    check_all(FSDP, compiled=False)
    check_all(ZERO, compiled=False)
    check_all(ZERO3, compiled=False)


def _compiled() -> None:
    check_all([("fsdp", 1, "none"), ("fsdp", 2, "none")], compiled=True)
    check_all([("zero3", 1, "none")], compiled=True)


@pytest.mark.long
def test_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    in_group(_all_combinations, 2, tmp_path)


@pytest.mark.long
def test_compiled_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    in_group(_compiled, 2, tmp_path)
