"""Triton kernels of norm, modulation, rotary position and residual against their twins, by the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deco_scale.kernels.norm import gated_residual, norm_modulate, qk_norm_rope, residual_norm_modulate, rms_norm
from deco_scale.kernels.select import use_kernels
from deco_scale.models import Denoiser, ModelConfig
from deco_scale.models.layers import Block, RMSNorm

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-6
# Sums of at most a few thousand products, in another order than the twin's, relative to the largest entry.
FP32 = 1e-6
# Half an ulp, relative to the number. The interpreter rounds to fp16 as a GPU does, but cuts bf16: a whole ulp.
ROUNDED = {torch.float16: 2**-11, torch.bfloat16: 2**-7}

Function = Callable[..., Tensor]


def run(
    function: Function, inputs: list[Tensor], dtype: torch.dtype | None = None, **settings: object
) -> list[Tensor]:
    """Output and gradients of all inputs that are wanted, of a weighted sum of the output."""
    leaves = [t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for t in inputs]
    out = function(*leaves, **settings)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference relative to the largest entry."""
    assert found.shape == wanted.shape
    return ((found.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()


def random(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    seed = 1000 * len(shape) + sum(shape)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x.to(DEVICE, dtype).requires_grad_(grad)


def modulated(x: Tensor, weight: Tensor, modulation: Tensor, **settings: object) -> Tensor:
    """As in a block: shift and scale are parts of one tensor."""
    shift, scale, _ = modulation.chunk(3, dim=-1)
    return torch.cat(norm_modulate(x, weight, shift, scale, eps=EPS, **settings))  # type: ignore[arg-type]


def between(x: Tensor, weight: Tensor, modulation: Tensor, y: Tensor, **settings: object) -> Tensor:
    """Between attention and MLP: both results, each with a gradient of its own."""
    gate, shift, scale = modulation.chunk(3, dim=-1)
    results = residual_norm_modulate(x, gate, y, weight, shift, scale, eps=EPS, **settings)  # type: ignore[arg-type]
    return torch.cat(results)


def residual(x: Tensor, modulation: Tensor, y: Tensor, **settings: object) -> Tensor:
    return gated_residual(x, modulation.chunk(3, dim=-1)[2], y, **settings)  # type: ignore[arg-type]


def heads(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, angles: Tensor | None, *context: Tensor, **settings: object
) -> Tensor:
    """q, and k and v with those of the context if there is one."""
    kv = context[0] if context else None
    return torch.cat(qk_norm_rope(qkv, kv, q_weight, k_weight, angles, eps=EPS, **settings), dim=1)  # type: ignore[arg-type]


def text_heads(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, **settings: object) -> Tensor:
    return heads(qkv, q_weight, k_weight, None, **settings)


def plain(x: Tensor, weight: Tensor, **settings: object) -> Tensor:
    return rms_norm(x, weight, eps=EPS, **settings)  # type: ignore[arg-type]


def cases(dtype: torch.dtype) -> list[tuple[Function, list[Tensor], dict[str, Any]]]:
    """Functions with inputs of odd sizes; weights stay in fp32 as autocast leaves them.

    The first of each has tokens for more than one program; the interpreter is slow, so the rest are few.
    """
    made: list[tuple[Function, list[Tensor], dict[str, Any]]] = []
    sizes = [(1, 17, 24), (2, 3, 3)] + ([(1, 2, 1152)] if dtype == torch.float32 else [])
    for cast_first in (False, True):
        settings: dict[str, Any] = {"cast_first": cast_first}
        for batch, tokens, dim in sizes[: 1 if cast_first else None]:
            x, modulation = random(batch, tokens, dim, dtype=dtype), random(batch, 1, 3 * dim, dtype=dtype)
            made.append((modulated, [x, random(dim), modulation], settings))
            y = random(batch, tokens, dim, dtype=dtype)
            made.append((between, [x, random(dim), modulation, y], settings))
            made.append((plain, [x, random(dim)], settings))
        for count, number, width in ((9, 3, 8), (3, 2, 72), (2, 1, 2))[: 1 if cast_first else None]:
            qkv = random(2, count, number, 3, width, dtype=dtype)
            weights = [random(width), random(1, width).detach()[0].requires_grad_()]
            angles = (20 * random(count, width // 2, grad=False)).detach()
            context = random(2, 5, number, 2, width, dtype=dtype)
            made.append((heads, [qkv, *weights, angles, context], settings))
        made.append((heads, [qkv, *weights, angles], settings))
        made.append((text_heads, [qkv, *weights], settings))
    for batch, tokens, dim in sizes:
        x, y = random(batch, tokens, dim, dtype=dtype), random(batch, tokens, dim, dtype=dtype)
        made.append((residual, [x, random(batch, 1, 3 * dim, dtype=dtype), y], {}))
    return made


def test_kernels_equal_torch_in_float64() -> None:
    for function, inputs, settings in cases(torch.float32):
        wanted = run(function, inputs, torch.float64, kernels="torch", **settings)
        found = run(function, inputs, kernels="triton", **settings)
        assert len(found) == len(wanted) == 1 + sum(t.requires_grad for t in inputs)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == torch.float32
            assert distance(one, other) < FP32, function


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """Against float64 of the same rounded inputs: only the norm's roundings and that of the result."""
    for function, inputs, settings in cases(dtype):
        # The norm is rounded before modulation, and factors of cast_first before their product.
        roundings = {modulated: 2.0, between: 3.0, heads: 2.0, text_heads: 2.0, plain: 1.0, residual: 1.0}[
            function
        ]
        roundings += 2.0 if settings.get("cast_first") else 0.0
        found = run(function, inputs, kernels="triton", **settings)
        wanted = run(
            function,
            [t.detach().double().requires_grad_(t.requires_grad) for t in inputs],
            kernels="torch",
            **settings,
        )
        assert [one.dtype for one in found] == [dtype, *(x.dtype for x in inputs if x.requires_grad)]
        for one, other in zip(found, wanted, strict=True):
            assert distance(one, other) < roundings * ROUNDED[dtype], function


@pytest.mark.parametrize("cast_first", [False, True])
def test_norm_and_rotation_round_like_torch(cast_first: bool) -> None:
    for function, inputs, settings in cases(torch.float16):
        if function not in (plain, heads, text_heads) or settings["cast_first"] != cast_first:
            continue
        found = function(*inputs, kernels="triton", **settings)
        wanted = function(*inputs, kernels="torch", **settings)
        # Sums in another order may tip a rounding, rarely.
        assert (found == wanted).float().mean() > 0.98
        torch.testing.assert_close(found, wanted, rtol=2**-9, atol=2**-12)


def test_mixed_dtypes_promote_as_in_torch() -> None:
    x, gate = random(2, 3, 8), random(2, 1, 24, dtype=torch.bfloat16)
    for function, inputs, settings in (
        (residual, [x, gate, random(2, 3, 8, dtype=torch.bfloat16)], {}),
        (modulated, [x, random(8), gate], {"cast_first": False}),
        (
            modulated,
            [x.detach().bfloat16().requires_grad_(), random(8), gate.detach().float()],
            {"cast_first": True},
        ),
    ):
        found = run(function, inputs, kernels="triton", **settings)
        wanted = run(function, inputs, kernels="torch", **settings)
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == other.dtype
            assert distance(one, other) < 4 * ROUNDED[torch.bfloat16]


def test_strided_inputs_and_expanded_gradients() -> None:
    wide = random(3, 9, 32)
    modulation = random(3, 1, 3 * 16)

    def of_parts(x: Tensor, modulation: Tensor, kernels: str) -> Tensor:
        # A slice of tokens and of columns, and columns that are not dense.
        part, sparse = x[:, 1:8, 16:], x[:, 1:8, ::2]
        out = residual(part, modulation, sparse, kernels=kernels)
        return modulated(
            out.transpose(0, 1).contiguous().transpose(0, 1), weight, modulation, cast_first=False, kernels=kernels
        )

    weight = random(16, grad=False)
    wanted = run(of_parts, [wide, modulation], kernels="torch")
    for one, other in zip(run(of_parts, [wide, modulation], kernels="triton"), wanted, strict=True):
        assert distance(one, other) < FP32
    # The gradient of a sum is one number, expanded to all strides of zero.
    grads = []
    for kernels in ("torch", "triton"):
        x = random(2, 3, 4).detach().requires_grad_()
        plain(x, random(4), cast_first=False, kernels=kernels).sum().backward()
        assert x.grad is not None
        grads.append(x.grad)
    assert distance(*grads) < FP32


def test_kernels_accept_zero_tokens() -> None:
    found = run(modulated, [random(2, 0, 8), random(8), random(2, 1, 24)], cast_first=False, kernels="triton")
    assert found[0].shape == (4, 0, 8) and not any(grad.any() for grad in found[2:])


def test_shapes_and_dtypes_that_do_not_fit_are_refused() -> None:
    x, weight, part = random(2, 3, 8), random(8), random(2, 1, 8)
    settings = {"eps": EPS, "cast_first": False, "kernels": "triton"}
    with pytest.raises(ValueError, match=r"shift must be \(2, 1, 8\)"):
        norm_modulate(x, weight, random(1, 1, 8), part, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="float64"):
        rms_norm(x.double(), weight, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weight \(9,\)"):
        rms_norm(x, random(9), **settings)  # type: ignore[arg-type]
    qkv, context = random(2, 3, 2, 3, 8), random(2, 4, 2, 2, 8)
    with pytest.raises(ValueError, match=r"angles must be \(3, 4\)"):
        qk_norm_rope(qkv, None, weight, weight, random(4, 4, grad=False), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"context_kv must be \(2, 4, 2, 2, 8\)"):
        qk_norm_rope(qkv, context[:1], weight, weight, None, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k and v need one type"):
        qk_norm_rope(qkv, context.bfloat16(), weight, weight, None, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="differ in shape"):
        gated_residual(x, part, random(2, 4, 8), kernels="triton")


def test_rows_that_would_overflow_registers_or_the_grid_are_refused() -> None:
    settings = {"eps": EPS, "cast_first": False, "kernels": "triton"}
    with pytest.raises(ValueError, match="16384, not 1 of 16385; use kernels=torch"):
        rms_norm(random(1, 1, 16385), random(16385), **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="262140 tokens"):
        gated_residual(random(1, 262141, 1), random(1, 1, 1), random(1, 262141, 1), kernels="triton")
    with pytest.raises(ValueError, match=r"not \(129, 128\); use kernels=torch"):
        qk_norm_rope(random(1, 1, 129, 3, 128), None, random(128), random(128), None, **settings)  # type: ignore[arg-type]


def test_operators_are_registered_soundly() -> None:
    """Schema, fake tensors, autograd and AOT dispatch, by torch's own checker."""
    x, part, weight = random(2, 5, 8), random(2, 1, 8), random(8)
    qkv, context = random(2, 5, 2, 3, 8), random(4, 2, 2, 2, 8, grad=False).transpose(0, 1).requires_grad_()
    # The operators exist once they are asked for.
    plain(x, weight, cast_first=False, kernels="triton")
    heads(qkv, weight, weight, None, cast_first=False, kernels="triton")
    residual(x, random(2, 1, 24), x, kernels="triton")
    ops = torch.ops.deco_scale
    torch.library.opcheck(ops.norm_modulate.default, (x, weight, part, random(2, 1, 8), EPS, False))
    torch.library.opcheck(ops.norm_modulate.default, (x, weight, None, None, EPS, True))
    torch.library.opcheck(ops.gated_residual.default, (x, part, random(2, 5, 8)))
    torch.library.opcheck(
        ops.residual_norm_modulate.default, (x, part, random(2, 5, 8), weight, part, part, EPS, True)
    )
    angles = random(5, 4, grad=False)
    torch.library.opcheck(ops.qk_norm_rope.default, (qkv, context, weight, weight, angles, EPS, True))
    torch.library.opcheck(ops.qk_norm_rope.default, (qkv, None, weight, weight, None, EPS, False))


def test_results_are_sequence_first_in_memory_where_inputs_are() -> None:
    """As tensor parallelism leaves tokens: what follows a collective needs no copy."""

    def sequence_first(*shape: int) -> Tensor:
        return random(*shape).detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    def is_sequence_first(x: Tensor | None) -> bool:
        return x is not None and x.transpose(0, 1).is_contiguous()

    x, y, part, weight = sequence_first(3, 5, 8), sequence_first(3, 5, 8), random(3, 1, 8), random(8)
    qkv, context = sequence_first(3, 5, 2, 3, 8), sequence_first(3, 4, 2, 2, 8)
    settings: dict[str, Any] = {"eps": EPS, "cast_first": False, "kernels": "triton"}
    results = [
        gated_residual(x, part, y, kernels="triton"),
        *norm_modulate(x, weight, part, part, **settings),
        *residual_norm_modulate(x, part, y, weight, part, part, **settings),
        *qk_norm_rope(qkv, context, weight, weight, None, **settings),
    ]
    sum(out.sum() for out in results).backward()  # type: ignore[union-attr]
    assert all(is_sequence_first(out) for out in (*results, x.grad, y.grad, qkv.grad, context.grad))


def block_run(block: Block, kernels: str, through: Callable[[Block], Function]) -> list[Tensor]:
    use_kernels(block, kernels)  # type: ignore[arg-type]
    block.zero_grad()
    x, condition = random(2, 6, 32), random(2, 1, 32)
    out = through(block)(x, condition, random(6, 4, grad=False), random(2, 3, 32, grad=False))
    out.square().sum().backward()
    leaves = (x, condition, *block.parameters())
    return [out.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("way", ["plain", "checkpointed", "compiled"])
def test_block_is_the_same_with_triton_and_torch(way: str) -> None:
    torch.manual_seed(0)
    block = Block(32, 4, mlp_hidden_dim=48, with_context=True, cast_first=False).to(DEVICE)
    ways: dict[str, Callable[[Block], Function]] = {
        "plain": lambda b: b,
        "checkpointed": lambda b: lambda *args: checkpoint(b, *args, use_reentrant=False),
        "compiled": lambda b: torch.compile(b, backend="aot_eager", fullgraph=True),
    }
    wanted = block_run(block, "torch", lambda b: b)
    found = block_run(block, "triton", ways[way])
    assert len(wanted) == len(found) == 3 + len(list(block.parameters()))
    for one, other in zip(found, wanted, strict=True):
        # Both in fp32, through two products and a softmax.
        assert distance(one, other) < 5 * FP32


@pytest.mark.parametrize("kind", ["t2i_deco", "c2i_baseline"])
def test_denoiser_is_the_same_with_triton_and_torch(kind: str) -> None:
    extra: dict[str, int] = {"num_classes": 3}
    if kind == "t2i_deco":
        extra = {"decoder_width": 8, "decoder_blocks": 1, "num_text_blocks": 1, "text_dim": 6, "text_tokens": 3}
    cfg = ModelConfig(kind=kind, dim=24, num_heads=2, num_blocks=2, patch_size=4, **extra)  # type: ignore[arg-type]
    torch.manual_seed(0)
    model = Denoiser(cfg).to(DEVICE)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    patches, t = random(2, 6, 48, grad=False), torch.tensor([0.2, 0.7], device=DEVICE)
    condition = random(2, 3, 6, grad=False) if kind == "t2i_deco" else torch.tensor([0, 3], device=DEVICE)
    results = []
    for kernels in ("torch", "triton"):
        # The decoder's kernels have their own tests.
        for part in (model.blocks, model.text_blocks, model.text_embed):
            if part is not None:
                use_kernels(part, kernels)  # type: ignore[arg-type]
        model.zero_grad()
        out = model(patches, t, condition, grid=(2, 3)).prediction_BNK
        out.square().sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append([out.detach(), *grads])
    assert len(results[0]) == len(results[1]) == 1 + len(list(model.parameters()))
    for one, other in zip(*results, strict=True):
        # Both in fp32, through all layers.
        assert distance(one, other) < 20 * FP32


def test_the_weight_is_looked_up_through_the_module() -> None:
    """Tensor parallelism shows a module another tensor as its weight while it runs."""
    norm, x = RMSNorm(8, cast_first=False).to(DEVICE), random(2, 3, 8, grad=False)
    shown = random(8)
    norm.register_forward_pre_hook(lambda module, args: module.__dict__.__setitem__("weight", shown))
    norm.register_forward_hook(lambda module, args, out: [out, module.__dict__.pop("weight")][0])
    for kernels in ("torch", "triton"):
        use_kernels(norm, kernels)  # type: ignore[arg-type]
        out = norm(x)
        torch.testing.assert_close(out, x / x.square().mean(-1, keepdim=True).add(EPS).sqrt() * shown)
        out.sum().backward()
        assert norm.weight.grad is None and shown.grad is not None
