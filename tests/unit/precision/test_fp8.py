"""FP8: what is chosen, which linears it takes, and what emulated linears compute."""

import importlib
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torchao.float8.float8_linear import Float8Linear

from deco_scale.errors import ConfigError
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.config import ActivationCheckpointing
from deco_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from deco_scale.precision import fp8
from deco_scale.precision.config import PrecisionConfig, autocast
from deco_scale.precision.fp8_plan import BatchShape, Fp8Plan, check_plan, plan_fp8, precision_rows
from deco_scale.precision.recipe import Fp8Choice, Machine, choose_fp8, planned_machine, resolve_fp8

CPU = torch.device("cpu")
MODEL = ModelConfig(
    kind="t2i_deco", dim=32, num_heads=4, num_blocks=2, num_text_blocks=1, patch_size=16, decoder_width=8,
    decoder_blocks=1, text_dim=24, text_tokens=8,
)  # fmt: skip
EMULATED = PrecisionConfig(compute="fp8", fp8_emulate=True)
SHAPE = BatchShape(batch=4, image_tokens=4, text_tokens=8)


def plan_of(
    choice: Fp8Choice,
    cfg: PrecisionConfig = EMULATED,
    *,
    tp: int = 1,
    shape: BatchShape = SHAPE,
    recompute: ActivationCheckpointing = "none",
    compiled: bool = False,
) -> Fp8Plan:
    return plan_fp8(MODEL, cfg, choice, tp=tp, batches=[shape], recompute=recompute, compile_blocks=compiled)


def denoiser(seed: int = 0) -> Denoiser:
    """With outputs and modulations away from zero, so that every gradient is."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Denoiser(MODEL)
        for name, parameter in model.named_parameters():
            if "modulation" in name or "head" in name:
                nn.init.normal_(parameter, std=0.2)
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(4, 4, MODEL.patch_values, generator=generator),
        torch.rand(4, generator=generator),
        torch.randn(4, 8, 24, generator=generator),
    )


def result(model: Denoiser, cfg: PrecisionConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Prediction and gradient of each parameter."""
    model.zero_grad()
    with autocast(cfg, CPU):
        out = model(*inputs(), grid=(2, 2)).prediction_BNK.float()
    out.square().mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor], names: Iterable[str]) -> float:
    """Relative error of a gradient, mean over the named parameters."""
    each = [((found[n] - wanted[n]).norm() / wanted[n].norm()).item() for n in names]
    return sum(each) / len(each)


# What is chosen


@pytest.mark.parametrize(
    ("settings", "chip", "wanted"),
    [
        ({}, "h100", Fp8Choice("te", "current")),
        ({}, "b200", Fp8Choice("te", "mxfp8")),
        ({}, "l40s", Fp8Choice("te", "current")),
        ({"fp8_recipe": "block"}, "h100", Fp8Choice("te", "block")),
        ({"fp8_recipe": "block"}, "b200", Fp8Choice("te", "mxfp8")),
        ({"fp8_recipe": "delayed"}, "h100", Fp8Choice("te", "delayed")),
        ({"fp8_backend": "torchao"}, "b200", Fp8Choice("torchao", "current")),
        ({"fp8_emulate": True}, "a100", Fp8Choice("torchao", "current", emulate=True)),
    ],
)
def test_auto_recipe_depends_on_the_gpu(settings: dict[str, Any], chip: str, wanted: Fp8Choice) -> None:
    cfg = PrecisionConfig(compute="fp8", **settings)
    assert resolve_fp8(cfg, planned_machine(chip)) == wanted


def test_torchao_is_used_if_transformer_engine_is_missing() -> None:
    machine = Machine(capability=(9, 0), cuda=(12, 8), te=False, torchao=True)
    assert resolve_fp8(PrecisionConfig(compute="fp8"), machine) == Fp8Choice("torchao", "current")


@pytest.mark.parametrize(
    ("settings", "machine", "message"),
    [
        (
            {},
            Machine(None, None, True, True),
            r"needs a GPU of compute capability 8.9.*has none.*fp8_emulate=true",
        ),
        ({}, planned_machine("a100"), r"this machine has 8.0; possible: bf16"),
        ({}, Machine((9, 0), (12, 9), False, False), r"transformer_engine\[pytorch\].* or pip install torchao"),
        ({"fp8_backend": "te"}, Machine((9, 0), (12, 9), False, True), r"fp8_backend=te needs pip install"),
        ({"fp8_backend": "torchao"}, Machine((9, 0), (12, 9), True, False), r"needs pip install torchao"),
        ({"fp8_recipe": "delayed"}, Machine((9, 0), (12, 9), False, True), r"delayed needs Transformer Engine"),
        ({"fp8_recipe": "block"}, Machine((9, 0), (12, 8), True, True), r"has 9.0 with CUDA 12.8; possible: auto"),
        (
            {"fp8_recipe": "block"},
            Machine((8, 9), (12, 9), True, True),
            r"has 8.9.*possible: auto, current, delayed",
        ),
        ({"fp8_emulate": True}, Machine(None, None, True, False), r"fp8_emulate=true needs torchao"),
    ],
)
def test_impossible_settings_list_the_possible_ones(
    settings: dict[str, Any], machine: Machine, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_fp8(PrecisionConfig(compute="fp8", **settings), machine)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fp8_backend": "torchao", "fp8_recipe": "delayed"}, "possible with torchao: auto, current"),
        ({"fp8_emulate": True, "fp8_recipe": "block"}, "possible with torchao: auto, current"),
        ({"fp8_emulate": True, "fp8_backend": "te"}, "needs fp8_backend: torchao"),
    ],
)
def test_contradictions_in_the_configuration_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(compute="fp8", **settings)


# Which linears


def test_linears_that_do_not_fit_are_listed_with_the_reason() -> None:
    odd_text = plan_of(Fp8Choice("te", "current"), shape=BatchShape(4, 4, 6))
    assert len(odd_text.linears) == 2 * 4 and len(odd_text.rejected) == 2 + 4
    assert odd_text.messages()[1:] == [
        "FP8: 6 linears stay in bf16, a micro-batch has 24 tokens, not a multiple of 16: "
        "text_blocks.{0}.attn.qkv, text_blocks.{0}.attn.proj, text_blocks.{0}.mlp.gate_up, "
        "text_blocks.{0}.mlp.down, blocks.{0-1}.attn.context_kv"
    ]
    # A rank of 4 has one head of 8: its projection's input is not a multiple of 16.
    local = plan_of(Fp8Choice("te", "current"), tp=4)
    assert {name.rpartition("blocks.")[2][2:] for name, _ in local.rejected} == {
        "attn.qkv",
        "attn.proj",
    }
    assert dict(local.rejected)["blocks.0.attn.qkv"] == "32 x 24 is not in multiples of 16"
    second = [f for f in local.linears if f.name.startswith("blocks.1.")]
    assert {f.name[9:]: (f.in_features, f.out_features) for f in second} == {
        "attn.context_kv": (32, 16), "mlp.gate_up": (32, 64), "mlp.down": (32, 32),
    }  # fmt: skip


def test_a_plan_without_any_fp8_linear_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no linear can compute in FP8 \(.*not in multiples of 128"):
        plan_of(Fp8Choice("te", "block"))


def test_a_plan_is_required_for_fp8_and_refused_otherwise() -> None:
    plan = plan_of(choose_fp8(EMULATED, CPU))
    check_plan(EMULATED, plan)
    with pytest.raises(ValueError, match="compute=bf16 with a plan"):
        check_plan(PrecisionConfig(), plan)
    with pytest.raises(ValueError, match="compute=fp8 with no plan"):
        check_plan(EMULATED, None)


def test_table_has_a_row_for_every_module_with_weights() -> None:
    with_weights = {n.rpartition(".")[0] for n, _ in denoiser().named_parameters()} - {"text_embed"}
    plan = plan_of(Fp8Choice("te", "current"), shape=BatchShape(4, 4, 6))
    rows = {row.name: row for row in precision_rows(MODEL, EMULATED, plan, tp=1)}
    assert rows.keys() == with_weights
    assert rows["blocks.0.attn.qkv"].computes == "fp8 e4m3, gradients e5m2"
    assert (rows["blocks.0.mlp.down"].in_features, rows["blocks.0.mlp.down"].out_features) == (128, 32)
    assert rows["blocks.0.attn.context_kv"].computes == "bf16"
    assert "24 tokens" in rows["blocks.0.attn.context_kv"].why
    assert rows["blocks.0.modulation"].computes == "bf16" and "by design" in rows["blocks.0.modulation"].why
    assert "fp8_decoder_condition" in rows["decoder.cond_proj"].why
    assert rows["blocks.0.norm1"].computes == "fp32"
    for compute in ("bf16", "fp32"):
        plain = {r.name: r for r in precision_rows(MODEL, PrecisionConfig(compute=compute), None, tp=1)}
        assert plain.keys() == with_weights and {plain[n].computes for n in ("patch_embed", "decoder.head")} == {
            compute
        }


# What is computed


@pytest.mark.parametrize("condition", [False, True])
def test_replacing_linears_keeps_every_parameter(condition: bool) -> None:
    cfg = PrecisionConfig(compute="fp8", fp8_emulate=True, fp8_decoder_condition=condition)
    model = denoiser()
    before = dict(model.named_parameters())
    plan = plan_of(choose_fp8(cfg, CPU), cfg)
    fp8.apply_fp8(model, plan)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert {p.dtype for p in after.values()} == {torch.float32}
    package, _, name = fp8.LINEAR_CLASSES[plan.choice.backend].rpartition(".")
    # DeepSpeed imports the class by this path and compares classes by identity.
    linear = getattr(importlib.import_module(package), name)
    swapped = {n for n, m in model.named_modules() if type(m) is linear}
    assert swapped == {f.name for f in plan.linears} and len(swapped) == 4 + 2 * 5 + condition
    assert issubclass(linear, Float8Linear)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To FP8 and back, scaled so that the largest value is the format's own, in float64."""
    scale = torch.finfo(dtype).max / x.double().abs().max()
    return (x.double() * scale).to(torch.float32).to(dtype).double() / scale


def test_emulated_linear_is_the_product_of_rounded_operands() -> None:
    model = denoiser()
    fp8.apply_fp8(model, plan_of(choose_fp8(EMULATED, CPU)))
    linear = model.get_submodule("blocks.0.attn.proj")
    weight, bias = (p.detach() for p in linear.parameters())
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(16, 32, generator=generator) for _ in range(2))
    x.requires_grad_(True)
    out = linear(x)
    out.backward(grad)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    x8, weight8, grad8 = _rounded(x.detach(), e4m3), _rounded(weight, e4m3), _rounded(grad, e5m2)
    # Sums of 16 or 32 fp32 terms; no value lies where the scale's last bit would decide its rounding.
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.detach().double(), x8 @ weight8.T + bias.double(), **close)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), grad8 @ weight8, **close)
    torch.testing.assert_close(linear.weight.grad.double(), grad8.T @ x8, **close)
    assert not torch.allclose(out.detach(), nn.functional.linear(x.detach(), weight, bias), atol=1e-3)


def test_gradients_equal_bf16_up_to_fp8_rounding() -> None:
    model, plain = denoiser(), denoiser()
    plan = plan_of(choose_fp8(EMULATED, CPU))
    fp8.apply_fp8(model, plan)
    exact = result(plain, PrecisionConfig(compute="fp32"))
    bf16 = result(plain, PrecisionConfig())
    found = result(model, EMULATED)
    assert found[1].keys() == exact[1].keys()
    swapped = [f"{linear.name}.weight" for linear in plan.linears]
    # e5m2 has two bits of mantissa: a gradient's value is off by up to 12.5 %, bf16's by 0.4 %.
    errors = [distance(gradients, exact[1], swapped) for gradients in (bf16[1], found[1])]
    assert 3 * errors[0] < errors[1] < 0.125
    # No gradient passes FP8 on its way to the output.
    assert distance(found[1], bf16[1], ["decoder.head.weight", "decoder.head.bias"]) < 0.02


def test_without_gradients_linears_compute_without_fp8() -> None:
    model, plain = denoiser(), denoiser()
    fp8.apply_fp8(model, plan_of(choose_fp8(EMULATED, CPU)))
    patches, times, text = (part[:1] for part in inputs())
    with torch.no_grad(), autocast(EMULATED, CPU):
        found, wanted = (m(patches, times, text, grid=(2, 2)).prediction_BNK for m in (model, plain))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_nothing(mode: ActivationCheckpointing) -> None:
    model, again = denoiser(), denoiser()
    plan = plan_of(choose_fp8(EMULATED, CPU))
    for m in (model, again):
        fp8.apply_fp8(m, plan)
    apply_activation_checkpointing(again.transformer_blocks, mode, function=fp8.checkpoint_function(plan))
    found, wanted = result(again, EMULATED), result(model, EMULATED)
    assert torch.equal(found[0], wanted[0])
    assert all(torch.equal(found[1][n], wanted[1][n]) for n in wanted[1])


def test_released_weights_are_looked_up_again() -> None:
    """As under ZeRO-3: between the passes the parameter's storage is another."""
    model, kept = denoiser(), denoiser()
    plan = plan_of(choose_fp8(EMULATED, CPU))
    fp8.apply_fp8(model, plan, release_weights=True)
    fp8.apply_fp8(kept, plan)
    for one, survives in ((model, False), (kept, True)):
        linear = one.get_submodule("blocks.0.mlp.gate_up")
        storage = StorageWeakRef(linear.weight.untyped_storage())
        with autocast(EMULATED, CPU):
            out = one(*inputs(), grid=(2, 2)).prediction_BNK
        full = linear.weight.detach().clone()
        linear.weight.data = torch.empty(0)
        assert storage.expired() is not survives
        linear.weight.data = full
        out.float().square().mean().backward()
    for (name, found), wanted in zip(model.named_parameters(), kept.parameters(), strict=True):
        assert found.grad is not None and wanted.grad is not None, name
        assert torch.equal(found.grad, wanted.grad), name


def test_ranks_add_their_share_of_a_bias() -> None:
    model, whole = denoiser(), denoiser()
    plan = plan_of(choose_fp8(EMULATED, CPU))
    fp8.apply_fp8(model, plan, bias_share=4)
    fp8.apply_fp8(whole, plan)
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(3))
    found, wanted = (m.get_submodule("blocks.1.attn.proj") for m in (model, whole))
    out, full = found(x), wanted(x)
    torch.testing.assert_close(full - out, (0.75 * wanted.bias).expand_as(out), rtol=0, atol=1e-6)
    out.sum().backward()
    assert torch.equal(found.bias.grad, torch.full((32,), 16 / 4))
    assert isinstance(found.bias, nn.Parameter)
