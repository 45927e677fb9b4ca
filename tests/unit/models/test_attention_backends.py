"""Attention of installed packages: how they are called, chosen and refused, shown by stand-ins.

No real package and no GPU takes part; tests/gpu/test_attention.py is for those.
"""

import sys
import types
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from deco_scale.models.attention import backends, dispatch
from deco_scale.models.attention.dispatch import KERNELS, attention, check_backend, kernel_missing
from tests.unit.models.test_attention import dynamo, inputs, results  # noqa: F401


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages that compute by PyTorch, with the calling conventions of the real ones, on a pretended GPU."""

    def flash(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and softmax_scale is None and not causal
        return KERNELS["sdpa"](q, k, v)

    class DotProductAttention(nn.Module):
        def __init__(
            self, num_heads: int, width: int, *, qkv_format: str, attn_mask_type: str, attention_type: str
        ):
            super().__init__()
            assert (num_heads, width, qkv_format, attn_mask_type) == (3, 8, "bshd", "no_mask")
            self.cross = attention_type == "cross"

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            assert self.cross == (q.shape[1] != k.shape[1])
            return flash(q, k, v).flatten(2)

    def add(name: str, **members: object) -> None:
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)

    add("flash_attn", flash_attn_func=flash, __path__=[])
    add("flash_attn.cute", flash_attn_func=lambda q, k, v: (flash(q, k, v), None))
    add("flash_attn_interface", flash_attn_func=lambda q, k, v: (flash(q, k, v), None))
    add("transformer_engine", __path__=[])
    add("transformer_engine.pytorch", DotProductAttention=DotProductAttention)
    _forget()
    yield
    _forget()


def _forget() -> None:
    for cached in (backends._import_error, backends._core_attention, dispatch._newest_flash):
        cached.cache_clear()


@pytest.mark.usefixtures("stand_ins", "dynamo")
@pytest.mark.parametrize("kernel", ["flash4", "flash3", "flash2", "te"])
@pytest.mark.parametrize("lengths", [(4, 6), (5, 5)], ids=str)
def test_packages_are_called_as_they_expect(kernel: str, lengths: tuple[int, int]) -> None:
    given = inputs(*lengths, 8, torch.bfloat16)
    # Queries and keys in fp32 take the values' dtype.
    mixed = [given[0].float(), given[1].float(), given[2], given[3]]
    found = results(lambda q, k, v: attention(q, k, v, kernel), mixed)  # type: ignore[arg-type]
    wanted = results(KERNELS["sdpa"], given)
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(found, wanted, strict=True))
    # Without registered operators: a graph break, and the same numbers.
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, kernel) + 0, backend="aot_eager")  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(results(compiled, given), wanted, strict=True))


@pytest.mark.usefixtures("stand_ins", "dynamo")
@pytest.mark.parametrize(("kernel", "namespace"), [("flash3", "flash_attn_3"), ("flash2", "flash_attn")])
def test_packages_with_operators_are_traced(kernel: str, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "flash_attn_interface" if kernel == "flash3" else "flash_attn"
    with torch.library._scoped_library(namespace, "FRAGMENT") as library:
        library.define("_flash_attn_forward(Tensor q, Tensor k, Tensor v) -> Tensor")
        library.impl("_flash_attn_forward", KERNELS["sdpa"], "CompositeImplicitAutograd")
        operator = getattr(torch.ops, namespace)._flash_attn_forward
        monkeypatch.setattr(sys.modules[module], "flash_attn_func", lambda q, k, v: operator(q, k, v))
        given = inputs(4, 6, 8, torch.bfloat16)
        compiled = torch.compile(
            lambda q, k, v: attention(q, k, v, kernel),  # type: ignore[arg-type]
            backend="aot_eager",
            fullgraph=True,
        )
        pairs = zip(results(compiled, given), results(KERNELS["sdpa"], given), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.usefixtures("stand_ins")
def test_packages_are_usable_by_compute_capability_dtype_and_head_width(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = dispatch.package_missing
    half = torch.bfloat16

    def usable(major: int, width: int = 64) -> list[str]:
        return [name for name in dispatch.PACKAGES if missing(name, (major, 0), half, width) is None]

    assert usable(7) == []
    assert usable(8) == ["flash2", "te"]
    assert usable(9) == ["flash4", "flash3", "flash2", "te"]
    assert usable(10) == ["flash4", "flash2", "te"]
    assert usable(10, 192) == ["flash2", "te"]
    assert usable(9, 68) == ["flash2"]
    assert "takes float16 and bfloat16" in str(missing("te", (9, 0), torch.float32, 64))
    assert "this one has 7.5" in str(missing("flash2", (7, 5), half, 64))
    assert "width 68" in str(missing("flash3", (9, 0), half, 68))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    _forget()
    assert "folder hopper" in str(missing("flash3", (9, 0), half, 64))
    assert "importing flash_attn_interface failed" in str(missing("flash3", (9, 0), half, 64))


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("major", "width", "kernel", "in_graphs"),
    [
        (9, 64, "flash4", "cudnn"), (8, 64, "flash2", "flash_torch"), (9, 68, "cudnn", "cudnn"),
        (12, 72, "flash2", "flash_torch"),
    ],
)  # fmt: skip
def test_flash_is_the_newest_that_fits(
    major: int, width: int, kernel: str, in_graphs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stand-ins register no operators, so that none can be in a graph; PyTorch would ask a driver.
    monkeypatch.setattr(dispatch, "_torch_refusal", lambda *args: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    device = torch.device("cuda", 0)
    assert dispatch._newest_flash(device, torch.bfloat16, width, False) == kernel
    assert dispatch._newest_flash(device, torch.bfloat16, width, True) == in_graphs
    check_backend("flash", device, dtype=torch.bfloat16, head_dim=width)
    with pytest.raises(ValueError, match=r"float32.*Use auto, sdpa or math"):
        check_backend("te", device, dtype=torch.float32, head_dim=width)


def test_cuda_kernels_need_a_cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    for kernel in ("flash4", "flash_torch", "te", "cudnn"):
        reason = kernel_missing(kernel, torch.device("cuda", 0), torch.bfloat16, 64)  # type: ignore[arg-type]
        assert reason is not None and "not built for CUDA" in reason
