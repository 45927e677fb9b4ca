"""Fast computations against the formulas written op by op."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from benchmarks.train.eager_reference import ReferenceDecoder, saved_bytes
from deco_scale.kernels import pixel_decoder
from deco_scale.kernels.pixel_decoder import render_pixels
from deco_scale.models.embeddings import PixelFeatures
from deco_scale.models.pixel_decoder import PixelDecoder


def made(kind: type[PixelDecoder], features: PixelFeatures, patch: int, width: int) -> PixelDecoder:
    torch.manual_seed(0)
    decoder = kind(dim=24, width=width, num_blocks=3, patch_size=patch, channels=3, features=features)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def run(decoder: PixelDecoder, dtype: torch.dtype, patch: int, tokens: int) -> list[Tensor]:
    """Output, and gradients of inputs and parameters."""
    decoder.to(dtype)
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, tokens, 3 * patch**2), (2, tokens, 24))
    inputs = [torch.randn(*s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    out = decoder(*inputs)
    out.square().sum().backward()
    leaves = [*inputs, *decoder.parameters()]
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("features", ["rotary", "cosine"])
@pytest.mark.parametrize(
    ("patch", "width", "tokens", "chunk"), [(16, 32, 5, 600), (4, 7, 1, 1), (8, 16, 9, 1 << 20)]
)
def test_pixel_decoder_equals_the_formula(
    features: PixelFeatures, patch: int, width: int, tokens: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pixel_decoder.CHUNK_PIXELS, "cpu", chunk)
    wanted = run(made(ReferenceDecoder, features, patch, width), torch.float64, patch, tokens)
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 3e-6)):
        found = run(made(PixelDecoder, features, patch, width), dtype, patch, tokens)
        assert len(found) == len(wanted) == 3 + 8 + 3 * 8
        for one, other in zip(found, wanted, strict=True):
            # Sums over pixels: relative to the largest entry, in float32 a few rounding errors of it.
            assert (one - other).abs().max() / other.abs().max().clamp(min=1e-12) < tolerance


def test_pixel_decoder_saves_only_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pixel_decoder.CHUNK_PIXELS, "cpu", 256)

    def kept(kind: type[PixelDecoder]) -> int:
        decoder = made(kind, "rotary", 16, 32)
        inputs = torch.randn(2, 16, 768), torch.randn(2, 16, 24, requires_grad=True)
        return saved_bytes(decoder, lambda: decoder(*inputs))

    assert kept(PixelDecoder) < kept(ReferenceDecoder) / 4


def random_weights(dtype: torch.dtype = torch.float32) -> pixel_decoder.DecoderWeights:
    """Of two pixels a patch, three channels, width 4 and two blocks."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    shapes = ((4,), (4,), (4, 4), (4,), (4, 4), (4,), (12, 4), (12,))
    block = pixel_decoder.BlockWeights(*(random(*shape) for shape in shapes))
    return pixel_decoder.DecoderWeights(random(4, 3), random(2, 4), [block, block], random(3, 4), random(3))


def test_types_are_those_of_autocast_or_must_be_equal() -> None:
    patches, condition = torch.randn(5, 6), torch.randn(5, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = render_pixels(patches, condition.bfloat16(), random_weights(), eps=1e-6, kernels="torch")
        assert out.dtype == torch.bfloat16
        double = random_weights(torch.float64)
        out = render_pixels(patches.double(), condition.double(), double, eps=1e-6, kernels="torch")
        assert out.dtype == torch.float64
    with pytest.raises(ValueError, match=r"bfloat16.*must be equal"):
        render_pixels(patches, condition.bfloat16(), random_weights(), eps=1e-6, kernels="torch")
    nowhere = tree_map(lambda tensor: tensor.to("meta"), (patches, condition, random_weights()))
    out = render_pixels(*nowhere, eps=1e-6, kernels="torch")
    assert out.shape == (5, 6)


def test_under_autocast_it_is_as_near_to_float64_as_op_by_op() -> None:
    inputs = torch.randn(2, 9, 192), torch.randn(2, 9, 24)

    def run_as(kind: type[PixelDecoder], dtype: torch.dtype) -> list[Tensor]:
        decoder = made(kind, "rotary", 8, 16)
        patches, token = (x.double() if dtype == torch.float64 else x for x in inputs)
        token = token.detach().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = decoder.to(torch.float64 if dtype == torch.float64 else torch.float32)(patches, token)
        out.double().square().mean().backward()
        assert token.grad is not None
        return [out.detach().double(), token.grad.double()]

    exact = run_as(ReferenceDecoder, torch.float64)
    found, op_by_op = (
        [((x - wanted).norm() / wanted.norm()).item() for x, wanted in zip(values, exact, strict=True)]
        for values in (run_as(kind, torch.bfloat16) for kind in (PixelDecoder, ReferenceDecoder))
    )
    # Of the output and of the token's gradient.
    assert all(ours < 1.1 * theirs for ours, theirs in zip(found, op_by_op, strict=True)), (found, op_by_op)


def test_a_second_derivative_is_refused() -> None:
    patches, condition = torch.randn(5, 6, requires_grad=True), torch.randn(5, 2, 4, requires_grad=True)
    loss = render_pixels(patches, condition, random_weights(), eps=1e-6, kernels="torch").sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, patches, create_graph=True)


def test_a_smaller_last_chunk_takes_no_memory_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(pixel_decoder.CHUNK_PIXELS, "cpu", 8)
    held: list[int] = []
    init, alive = pixel_decoder._Chunk.__init__, weakref.WeakSet[pixel_decoder._Chunk]()

    def count(self: pixel_decoder._Chunk, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        alive.add(self)
        held.append(len(alive))

    monkeypatch.setattr(pixel_decoder._Chunk, "__init__", count)
    condition = torch.randn(7, 2, 4, requires_grad=True)
    render_pixels(torch.randn(7, 6), condition, random_weights(), eps=1e-6, kernels="torch").sum().backward()
    # Chunks of four patches and of three, in both passes.
    assert held == [1, 1, 1, 1]


def test_strides_of_the_inputs_do_not_matter() -> None:
    found = []
    for patches, condition in (
        (torch.arange(30.0).view(5, 6), torch.arange(40.0).view(5, 2, 4)),
        (torch.arange(30.0).view(5, 6).t().contiguous().t(), torch.arange(40.0).view(5, 8).t().contiguous().t()),
    ):
        leaves = [patches.detach().sin().requires_grad_(), condition.detach().cos().requires_grad_()]
        out = render_pixels(leaves[0], leaves[1].view(5, 2, 4), random_weights(), eps=1e-6, kernels="torch")
        (out * out.detach()).sum().backward()
        found.append([out.detach(), *(leaf.grad.reshape(5, -1) for leaf in leaves if leaf.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_pixel_decoder_is_the_same_without_gradients() -> None:
    decoder = made(PixelDecoder, "rotary", 8, 16)
    inputs = torch.randn(2, 5, 192), torch.randn(2, 5, 24)
    with torch.no_grad():
        without = decoder(*inputs)
    assert torch.equal(without, decoder(*inputs))
