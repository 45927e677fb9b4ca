"""Attention: PyTorch's kernels against the formula, refusals, the measured choice, tables under torch.compile."""

import pickle
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from deco_scale.models import ModelConfig
from deco_scale.models.attention import autotune
from deco_scale.models.attention.autotune import (
    AttentionShape,
    BackendChoice,
    choose_backend,
    error_bound,
    model_shapes,
    table_of,
)
from deco_scale.models.attention.dispatch import KERNELS, AttentionTable, attention, check_backend
from deco_scale.models.layers import Attention

CPU = torch.device("cpu")
SHAPES = [(4, 4, 8), (5, 13, 6), (1, 7, 3), (64, 96, 64), (33, 1, 16)]
"""Queries, keys, head width: odd numbers, and more and fewer keys than queries."""


def inputs(queries: int, keys: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and a gradient of the output; 2 samples, 3 heads."""
    generator = torch.Generator().manual_seed(0)
    sizes = [(2, length, 3, width) for length in (queries, keys, keys, queries)]
    q, k, v, grad = (torch.randn(size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes)
    return q, k, v, grad


def results(call: Callable[[Tensor, Tensor, Tensor], Tensor], given: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in given[:3]]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def largest_error(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Relative to the largest entry, or to that of the first result: with one key two gradients are zero."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)]
    floor = pairs[0][1].abs().max()
    return max(((a - b).abs().max() / torch.maximum(b.abs().max(), floor)).item() for a, b in pairs)


def by_hand(given: Sequence[Tensor]) -> list[Tensor]:
    """Output and gradients head by head, with the derivative of softmax written out."""
    q, k, v, grad = (x.double() for x in given)
    found = [torch.empty_like(x) for x in (grad, q, k, v)]
    scale = 1 / q.shape[-1] ** 0.5
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            scores = q[b, :, h] @ k[b, :, h].T * scale
            weights = torch.exp(scores - scores.logsumexp(1, keepdim=True))
            upstream = grad[b, :, h] @ v[b, :, h].T
            slope = weights * (upstream - (upstream * weights).sum(1, keepdim=True)) * scale
            found[0][b, :, h] = weights @ v[b, :, h]
            found[1][b, :, h] = slope @ k[b, :, h]
            found[2][b, :, h] = slope.T @ q[b, :, h]
            found[3][b, :, h] = weights.T @ grad[b, :, h]
    return found


@pytest.mark.parametrize("backend", ["math", "sdpa", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_are_the_formula(backend: str, shape: tuple[int, int, int]) -> None:
    # A few rounding errors of each dtype, relative to the largest entry; sums have at most 96 terms.
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 5e-6)):
        given = inputs(*shape, dtype)
        found = results(lambda q, k, v: attention(q, k, v, backend), given)  # type: ignore[arg-type]
        assert [x.dtype for x in found] == 4 * [dtype]
        assert largest_error(found, by_hand(given)) < tolerance


def test_math_is_float32_under_autocast() -> None:
    given = inputs(64, 96, 64, torch.bfloat16)
    plain = attention(*given[:3], "math")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attention(*given[:3], "math"), plain)
    # Queries and keys may come out of their norm in fp32; the values' dtype is that of the output.
    mixed = attention(given[0].float(), given[1].float(), given[2], "math")
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_error_bound_accepts_pytorch_and_rejects_a_wrong_scale(dtype: torch.dtype) -> None:
    given = inputs(64, 96, 64, dtype)
    wanted = by_hand(given)
    assert largest_error(results(KERNELS["sdpa"], given), wanted) < error_bound(dtype)
    wrong = results(lambda q, k, v: KERNELS["sdpa"](q * 1.1, k, v), given)
    assert largest_error(wrong, wanted) > error_bound(dtype)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (
            "flash",
            ["pip install flash-attn-4", "folder hopper", "flash-attn>=2.7", "flash_torch needs a CUDA build"],
        ),
        ("te", ["Transformer Engine 2", "transformer-engine[pytorch]>=2", "compute capability 8.x"]),
        ("cudnn", ["a CUDA build of PyTorch and a GPU"]),
    ],
)
def test_backends_that_need_a_gpu_are_refused_on_a_cpu(backend: str, said: list[str]) -> None:
    with pytest.raises(ValueError, match="computes on cpu") as error:
        check_backend(backend, CPU, dtype=torch.bfloat16, head_dim=64)  # type: ignore[arg-type]
    for part in (f"attention.backend={backend}", "Use auto, sdpa or math", *said):
        assert part in str(error.value)


def test_every_backend_is_either_usable_or_refused() -> None:
    given = inputs(5, 13, 6, torch.float32)
    for backend in ("auto", "sdpa", "math"):
        check_backend(backend, CPU, dtype=torch.bfloat16, head_dim=64)  # type: ignore[arg-type]
        attention(*given[:3], backend)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'fast' is none of"):
        attention(*given[:3], "fast")  # type: ignore[arg-type]
    # PyTorch has a flash kernel for the CPU; the name means those of GPUs.
    with pytest.raises(ValueError, match=r"attention\.backend=flash cannot run here"):
        attention(*given[:3], "flash")


class Stopwatch:
    """Milliseconds that a test sets, in the order in which candidates are timed; runs each once."""

    def __init__(self, *times: float) -> None:
        self.times = list(times)

    def __call__(self, run: Callable[[], object], device: torch.device) -> float:
        run()
        return self.times.pop(0)


def _raises(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nand more lines")


def test_autotune_selects_the_fastest_candidate_that_matches_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa = KERNELS["sdpa"]
    candidates = {
        "slow": sdpa,
        "raises": _raises,
        "fast": KERNELS["math"],
        "wrong": lambda q, k, v: sdpa(q * 1.1, k, v),
        "wrong gradient": lambda q, k, v: sdpa(q, k, v.detach() + 0 * v),
        "not a number": lambda q, k, v: sdpa(q, k, v) * float("nan"),
        "flat": lambda q, k, v: sdpa(q, k, v).flatten(2),
    }
    shape = AttentionShape(batch=2, queries=5, keys=13, num_heads=3, head_dim=8)
    monkeypatch.setattr(autotune, "median_ms", Stopwatch(3.0, 1.5))
    found = choose_backend(shape, device=CPU, dtype=torch.float32, candidates=candidates)
    assert found.kernel == "fast"
    assert found.times_ms == (("fast", 1.5), ("slow", 3.0))
    reasons = dict(found.left_out)
    assert set(reasons) == {"raises", "wrong", "wrong gradient", "not a number", "flat"}
    assert reasons["raises"] == "RuntimeError: no kernel image"
    assert "differs from the formula" in reasons["wrong"] and "shape" in reasons["flat"]
    assert pickle.loads(pickle.dumps(found)) == found  # noqa: S301
    line = found.line()
    assert "\n" not in line and "fast of fast 1.500 ms, slow 3.000 ms; without raises: " in line


def test_on_hopper_a_kernel_made_for_it_wins_a_tie() -> None:
    times = {"flash2": 1.0, "cudnn": 1.02, "flash3": 1.01, "te": 0.99}
    assert autotune.preferred(times, hopper=True) == "flash3"
    assert autotune.preferred(times, hopper=False) == "te"
    assert autotune.preferred(times | {"te": 0.9}, hopper=True) == "te"


def test_autotune_measures_by_the_clock_on_a_cpu_and_fails_without_a_candidate() -> None:
    shape = AttentionShape(batch=1, queries=4, keys=4, num_heads=1, head_dim=8)
    found = choose_backend(shape, device=CPU, dtype=torch.float32, candidates={"sdpa": KERNELS["sdpa"]})
    assert found.kernel == "sdpa" and found.times_ms[0][1] > 0
    with pytest.raises(ValueError, match="no attention kernel computes .*no kernel image"):
        choose_backend(shape, device=CPU, dtype=torch.float32, candidates={"a": _raises})


def test_auto_measures_nothing_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    shape = AttentionShape(batch=2, queries=256, keys=384, num_heads=24, head_dim=64)
    monkeypatch.setattr(autotune, "median_ms", Stopwatch())
    found = choose_backend(shape, device=CPU, dtype=torch.bfloat16)
    assert found == BackendChoice(shape, "sdpa") and "not measured" in found.line()
    assert torch.equal(torch.get_rng_state(), state)


def test_model_shapes_are_those_of_its_attention_calls() -> None:
    cfg = ModelConfig(
        kind="t2i_deco", dim=1536, num_heads=24, num_blocks=1, patch_size=16, decoder_width=32, decoder_blocks=1,
        text_dim=8, text_tokens=128, num_text_blocks=1,
    )  # fmt: skip
    assert model_shapes(cfg, resolution=512, batch=4, tp=2) == (
        AttentionShape(4, 1024, 1152, 12, 64),
        AttentionShape(4, 128, 128, 12, 64),
    )
    with pytest.raises(ValueError, match="250x250"):
        model_shapes(cfg, resolution=250, batch=4)


def test_table_selects_the_kernel_by_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def noted(name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda q, k, v: (called.append(name), KERNELS["math"](q, k, v))[1]

    for name in ("flash2", "cudnn", "sdpa"):
        monkeypatch.setitem(KERNELS, name, noted(name))
    choices = [
        BackendChoice(AttentionShape(1, n, m, 3, 8), kernel)
        for n, m, kernel in ((4, 6, "sdpa"), (16, 18, "flash2"), (2, 2, "cudnn"))
    ]
    table = table_of(choices)
    for shape in ((4, 6), (2, 2), (16, 18), (6, 4)):
        attention(*inputs(*shape, 8, torch.float32)[:3], table)
    assert called == ["sdpa", "cudnn", "flash2", "flash2"]
    assert hash(table) == hash(table_of(reversed(choices)))
    with pytest.raises(ValueError, match="'flash3.5' is none of"):
        attention(*inputs(4, 6, 8, torch.float32)[:3], AttentionTable("flash3.5"))  # type: ignore[arg-type]


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(backend: AttentionTable | str) -> Attention:
    torch.manual_seed(0)
    module = Attention(24, 3, with_context=True, cast_first=False)
    module.backend = backend  # type: ignore[assignment]
    return module


TABLE = AttentionTable("math", ((4, 6, "sdpa"), (9, 11, "flash_torch")))


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["auto", "math", TABLE], ids=["auto", "math", "table"])
@pytest.mark.parametrize("dynamic", [False, None], ids=["static", "dynamic"])
def test_compiled_attention_is_one_graph_per_shape(backend: AttentionTable | str, dynamic: bool | None) -> None:
    """No graph break (``fullgraph``), and no compilation once each shape has been seen."""
    counter = CompileCounter()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(made(backend) for _ in range(2))
            for layer in self.layers:
                layer.compiled = torch.compile(layer.forward, backend=counter, fullgraph=True, dynamic=dynamic)

    stack = Stack()
    for tokens in (4, 9, 5):
        x, context = torch.randn(2, tokens, 24), torch.randn(2, 2, 24)
        for _ in range(3):
            for layer in stack.layers:
                found = layer.compiled(x, None, context)
                assert torch.equal(found, layer(x, None, context))
    assert counter.frame_count <= 3 * len(stack.layers)
    compiled = counter.frame_count
    for tokens in (5, 4, 9):
        for layer in stack.layers:
            layer.compiled(torch.randn(2, tokens, 24), None, torch.randn(2, 2, 24))
    assert counter.frame_count == compiled


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["sdpa", "math", TABLE], ids=["sdpa", "math", "table"])
def test_compile_checkpointing_and_autocast_keep_the_gradients(backend: AttentionTable | str) -> None:
    x, context = torch.randn(2, 9, 24), torch.randn(2, 2, 24)

    def gradients(call: Callable[..., Tensor], module: Attention) -> list[Tensor]:
        module.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = call(x, None, context)
        out.float().square().sum().backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    module = made(backend)
    wanted = gradients(module, module)
    recomputed = gradients(lambda *a: checkpoint(module, *a, use_reentrant=False), module)
    assert all(torch.equal(a, b) for a, b in zip(recomputed, wanted, strict=True))
    # aot_eager traces autograd without generating code: the same operations in the same order.
    compiled = gradients(torch.compile(module, backend="aot_eager", fullgraph=True), module)
    # Casts of autocast may be kept apart or joined: a few bf16 rounding errors.
    assert largest_error(compiled, wanted) < 4 * torch.finfo(torch.bfloat16).eps


def test_pytorch_flash_agrees_on_the_cpu() -> None:
    """The kernel behind ``flash_torch`` exists for the CPU too, which shows the call and its layout."""
    given = inputs(33, 47, 16, torch.float32)
    assert largest_error(results(KERNELS["flash_torch"], given), by_hand(given)) < 5e-6
    wanted = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in given[:3])).transpose(1, 2)
    assert torch.equal(KERNELS["sdpa"](*given[:3]), wanted)
