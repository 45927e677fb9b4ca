"""The wiring of Transformer Engine by a stand-in: what is asked of it, not what it computes."""

import functools
import importlib.util
import sys
import types
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deco_scale.errors import ConfigError
from deco_scale.precision import fp8
from deco_scale.precision.fp8_plan import Fp8Plan
from deco_scale.precision.recipe import Fp8Choice
from tests.unit.precision.test_fp8 import denoiser, inputs, plan_of

WRAPPER = "deco_scale.precision.transformer_engine"
KINDS = ("scale_fwd", "amax_history_fwd", "scale_bwd", "amax_history_bwd")
"""Of a checkpoint; those written before Transformer Engine 2.20 have the same."""


class _Recipe:
    """Of the stand-in."""

    def __init__(self, **settings: Any) -> None:
        self.settings = settings


class _ScalingState:
    """Scales and largest values of one direction; quantizers hold views of both, as in 2.20.2."""

    def __init__(self, recipe: _Recipe, size: int) -> None:
        self.scale = torch.ones(size)
        self.amax_history = torch.zeros(recipe.settings["amax_history_len"], size)

    def make_quantizers(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.scale[i], self.amax_history[0][i].reshape(1)) for i in range(len(self.scale))]


class _Linear(nn.Module):
    """A plain linear with the constructor, the scaling tensors and the extra state of ``te.Linear`` 2.20.2."""

    active: list[Any] = []

    def __init__(self, inputs: int, outputs: int, *, bias: bool, params_dtype: torch.dtype, device: str) -> None:
        super().__init__()
        assert device == "meta" and params_dtype == torch.float32
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device))
        # Without a bias the real one has an empty tensor, not None.
        self.bias = nn.Parameter(torch.empty(outputs, device=device)) if bias else torch.empty(0)
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False, "fp8_group": None}
        self.quantizers: dict[str, list[tuple[Tensor, Tensor]]] = {"scaling_fwd": [], "scaling_bwd": []}
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.seen.append(bool(self.active))
        if self.active and "amax_history_len" in self.active[-1].settings:
            self.fp8_meta |= {"fp8_checkpoint": True, "num_gemms": 1, "recipe": self.active[-1]}
            self.init_fp8_meta_tensors(self.active[-1])
        return nn.functional.linear(x, self.weight, self.bias if self.bias.numel() else None)

    def init_fp8_meta_tensors(self, recipe: Any) -> None:
        for key, size in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            if key not in self.fp8_meta:
                self.fp8_meta[key] = _ScalingState(recipe, self.fp8_meta["num_gemms"] * size)
                self.quantizers[key] = self.fp8_meta[key].make_quantizers()

    def get_extra_state(self) -> Tensor:
        raise AssertionError("the extra state is a pickle")

    def set_extra_state(self, state: Tensor) -> None:
        raise RuntimeError("Refusing to load pickled Transformer Engine extra state")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A module tree called ``transformer_engine``."""

    @contextmanager
    def context(*, enabled: bool, recipe: Any) -> Any:
        assert enabled
        _Linear.active.append(recipe)
        yield
        _Linear.active.pop()

    package, te, common, recipes = (
        types.ModuleType(n) for n in ("transformer_engine", "pytorch", "common", "recipe")
    )
    te.Linear, te.autocast, te.checkpoint = _Linear, context, object()  # type: ignore[attr-defined]
    for name in ("DelayedScaling", "Float8CurrentScaling", "Float8BlockScaling", "MXFP8BlockScaling"):
        setattr(recipes, name, _Recipe)
    package.pytorch, package.common, common.recipe = te, common, recipes  # type: ignore[attr-defined]
    for path, module in (("", package), (".pytorch", te), (".common", common), (".common.recipe", recipes)):
        monkeypatch.setitem(sys.modules, f"transformer_engine{path}", module)
    # Of the package that it finds where it is imported.
    monkeypatch.setitem(sys.modules, WRAPPER, package)
    monkeypatch.delitem(sys.modules, WRAPPER)
    return te


def test_transformer_engine_linears_keep_the_parameters(stand_in: types.ModuleType) -> None:
    model, plain = denoiser(), denoiser()
    before = dict(model.named_parameters())
    plan = plan_of(Fp8Choice("te", "current"))
    fp8.apply_fp8(model, plan)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[n] is before[n] for n in before)
    assert fp8.checkpoint_function(plan) is stand_in.checkpoint  # type: ignore[attr-defined]
    assert fp8.scaling_state(model, plan) == {}
    with fp8.fp8_context(plan):
        found = model(*inputs(), grid=(2, 2)).prediction_BNK
    assert torch.equal(found, plain(*inputs(), grid=(2, 2)).prediction_BNK)
    with torch.no_grad():
        model(*inputs(), grid=(2, 2))
    linears = [m for m in model.modules() if isinstance(m, _Linear)]
    assert len(linears) == 14 and all(m.seen == [True] for m in linears)


@pytest.mark.parametrize("after_a_pass", [False, True])
def test_delayed_scaling_is_part_of_a_checkpoint(stand_in: types.ModuleType, after_a_pass: bool) -> None:
    plan = plan_of(Fp8Choice("te", "delayed"))
    model, resumed = denoiser(), denoiser()
    for m in (model, resumed):
        fp8.apply_fp8(m, plan)
        if after_a_pass:
            with fp8.fp8_context(plan):
                m(*inputs(), grid=(2, 2))
    fresh = fp8.scaling_state(model, plan)
    assert {t.dtype for t in fresh.values()} == {torch.float32}
    assert fresh["fp8.denoiser.blocks.0.attn.qkv.amax_history_fwd"].shape == (1024, 3)
    state = random_scaling(fresh)
    assert state.keys() == {f"fp8.denoiser.{linear.name}.{kind}" for linear in plan.linears for kind in KINDS}
    fp8.load_scaling_state(resumed, plan, state)
    check_scaling(resumed, plan, state)
    # A pass finds the tensors there, and state that was handed out is a copy.
    with fp8.fp8_context(plan):
        resumed(*inputs(), grid=(2, 2))
    check_scaling(resumed, plan, state)
    for found in fp8.scaling_state(resumed, plan).values():
        found.zero_()
    check_scaling(resumed, plan, state)
    # One linear's tensors are missing: it alone starts afresh.
    part = {n: t for n, t in state.items() if "blocks.1.mlp.gate_up" not in n}
    fp8.load_scaling_state(model, plan, part)
    again = fp8.scaling_state(model, plan)
    assert all(torch.equal(again[n], part.get(n, fresh[n])) for n in state)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Transformer Engine's own manager of scales, with its tensors on the CPU; skips where it is not installed."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    from transformer_engine.pytorch import quantization

    from deco_scale.precision.transformer_engine import te_recipe

    create, manager = quantization.RecipeState.create, quantization.FP8GlobalStateManager
    on_cpu = functools.partial(create, device=torch.device("cpu"))
    monkeypatch.setattr(quantization.RecipeState, "create", staticmethod(on_cpu))
    monkeypatch.setattr(quantization, "get_default_fp8_recipe", lambda: te_recipe("delayed"))
    monkeypatch.setattr(quantization, "check_recipe_support", lambda recipe: None)
    monkeypatch.setattr(manager, "is_fp8_available", lambda: (True, ""))
    # Its own update in PyTorch: the other is a CUDA kernel.
    monkeypatch.setenv("NVTE_UNFUSED_FP8_UPDATE", "1")
    manager.reset()
    yield manager
    manager.reset()


def real_pass(manager: Any, model: nn.Module, plan: Fp8Plan, number: int) -> None:
    """All of a forward and backward pass that concerns scales: largest values seen, reduced, made into scales."""
    generator = torch.Generator().manual_seed(number)
    linears: list[Any] = [model.get_submodule(linear.name) for linear in plan.linears]
    with torch.compiler.set_stance("force_eager"):
        with fp8.fp8_context(plan):
            for linear in linears:
                linear.init_fp8_metadata()
                manager.add_fp8_tensors_to_global_buffer(linear.fp8_meta)
                for quantizer in (*linear.quantizers["scaling_fwd"], *linear.quantizers["scaling_bwd"]):
                    quantizer.calibrate(torch.randn(8, generator=generator))
        manager.reduce_and_update_fp8_tensors(forward=False)


@pytest.mark.parametrize("after_a_pass", [False, True])
def test_real_delayed_scaling_resumes_from_a_checkpoint(real: Any, after_a_pass: bool) -> None:
    """Transformer Engine's own quantizers, histories and update; no product is computed."""
    plan = plan_of(Fp8Choice("te", "delayed"))
    model, resumed = denoiser(), denoiser()
    for m in (model, resumed):
        fp8.apply_fp8(m, plan)
    fresh = fp8.scaling_state(model, plan)
    for number in range(3):
        real_pass(real, model, plan, number)
    state = fp8.scaling_state(model, plan)
    assert all(not torch.equal(state[n], fresh[n]) for n in state)
    real_pass(real, model, plan, 3)
    expected = fp8.scaling_state(model, plan)
    # As in another process.
    real.reset()
    if after_a_pass:
        real_pass(real, resumed, plan, 7)
    fp8.load_scaling_state(resumed, plan, state)
    check_scaling(resumed, plan, state)
    real_pass(real, resumed, plan, 3)
    check_scaling(resumed, plan, expected)


def test_real_extra_state_is_a_pickle_that_is_refused(real: Any) -> None:
    """Why the scaling tensors are copied one by one; a version that loads it again makes this test fail."""
    plan = plan_of(Fp8Choice("te", "delayed"))
    model = denoiser()
    fp8.apply_fp8(model, plan)
    real_pass(real, model, plan, 0)
    linear: Any = model.get_submodule(plan.linears[0].name)
    with pytest.raises(RuntimeError, match="Refusing to load pickled"):
        linear.set_extra_state(linear.get_extra_state())


def random_scaling(like: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {n: torch.rand(t.shape, generator=generator) for n, t in like.items()}


def check_scaling(model: nn.Module, plan: Fp8Plan, expected: dict[str, Tensor]) -> None:
    """What is saved, what the linears hold and what their quantizers see is ``expected``."""
    found = fp8.scaling_state(model, plan)
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in expected)
    for linear in plan.linears:
        module: Any = model.get_submodule(linear.name)
        for way, size in (("fwd", 3), ("bwd", 2)):
            assert len(module.quantizers[f"scaling_{way}"]) == size
            for i, quantizer in enumerate(module.quantizers[f"scaling_{way}"]):
                scale, amax = quantizer if isinstance(quantizer, tuple) else (quantizer.scale, quantizer.amax)
                assert scale.item() == expected[f"fp8.denoiser.{linear.name}.scale_{way}"][i]
                assert amax.item() == expected[f"fp8.denoiser.{linear.name}.amax_history_{way}"][0, i]


def test_scaling_that_only_one_side_has_is_skipped_with_a_message() -> None:
    model = {"model.denoiser.blocks.0.attn.qkv.weight": (96, 32)}
    scaling = {f"fp8.denoiser.blocks.0.attn.qkv.{kind}": (3,) for kind in ("scale_fwd", "scale_bwd")}
    assert fp8.unmatched_scaling(model | scaling, model | scaling) == (set(), [])
    names, lines = fp8.unmatched_scaling(model, model | scaling)
    assert names == set(scaling) and "1 linears start with fresh scaling" in lines[0]
    names, lines = fp8.unmatched_scaling(model | scaling, {})
    assert names == set(scaling) and "of 1 linears is not used" in lines[0]


def test_settings_that_do_not_work_with_transformer_engine_are_refused() -> None:
    te = Fp8Choice("te", "current")
    with pytest.raises(ConfigError, match="selective does not see.*possible: none, full"):
        plan_of(te, recompute="selective")
    with pytest.raises(ConfigError, match=r"compile=true.*activation_checkpointing=full.*or compile=false"):
        plan_of(te, recompute="full", compiled=True)
    # Transformer Engine itself refuses it in graphs.
    with pytest.raises(ConfigError, match=r"compile=true.*fp8_recipe=delayed; possible: auto, current, block"):
        plan_of(Fp8Choice("te", "delayed"), compiled=True)
    assert plan_of(te, recompute="full").linears and plan_of(te, compiled=True).linears


def test_a_broken_transformer_engine_is_an_error_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.delitem(sys.modules, WRAPPER, raising=False)
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install"):
        fp8.apply_fp8(denoiser(), plan_of(Fp8Choice("te", "current")))
