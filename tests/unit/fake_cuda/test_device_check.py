"""What looks at operators finds what it looks for, and every operator of the project is what its fake says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._device import _device_constructors

from deco_scale.models.embeddings import rope_angles
from tests.support.device_check import DeviceCheck, DeviceFault
from tests.support.fake_cuda import fake_cuda, meta_device


class Faulty(nn.Module):
    """A layer with a fault, which takes the place of a line in the middle."""

    def __init__(self, fault: Callable[[Tensor], object], device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, 4, device=device))
        self._fault = fault

    def forward(self, x: Tensor) -> Tensor:
        hidden = x @ self.weight
        self._fault(hidden)
        return hidden.relu()


HOST = torch.ones(4)
FAULTS: dict[str, tuple[Callable[[Tensor], object], str]] = {
    "a tensor without a device": (lambda x: torch.arange(4), "aten::arange .*on the host"),
    "that takes part": (lambda x: x + torch.arange(4), "aten::arange"),
    "a number read": (lambda x: x.sum().item(), "aten::_local_scalar_dense reads a value"),
    "a branch": (lambda x: 1 if x.sum() > 0 else 0, "aten::(_local_scalar_dense|is_nonzero) reads a value"),
    "a mask as index": (lambda x: x[x > 0], "aten::index reads a value"),
    "positions": (lambda x: x.nonzero(), "aten::nonzero reads a value"),
    "a copy to the host": (lambda x: x.cpu(), "aten::_to_copy .*read on the host"),
    "a number assigned": (lambda x: x.detach()[0].__setitem__(0, 1.0), "aten::lift_fresh"),
    "two devices": (lambda x: x * HOST, "aten::mul .*of two devices"),
    "a scalar of the host": (lambda x: x * HOST[0], "aten::(select|mul)"),
    "sent without page-locked memory": (lambda x: HOST.to(x.device, non_blocking=True), "aten::_to_copy"),
}


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_reported_with_operator_and_line(fault: str, device: str) -> None:
    call, message = FAULTS[fault]
    if fault == "a number assigned" and device == "meta":
        # There PyTorch fills by the number itself.
        message = ""
    if fault == "sent without page-locked memory" and device == "meta":
        message = "aten::_to_copy .*copied to the device"
    with fake_cuda() if device == "cuda" else meta_device():
        x = torch.empty(2, 4, device=device)
        with DeviceCheck(device) as check:
            Faulty(lambda hidden: hidden * 2.0, device)(x)
        # Tensors kept for backward are detached, on one of the two devices.
        names = [c.name for c in check.calls if c.name != "aten::detach"]
        assert names == ["aten::empty", "aten::mm", "aten::mul", "aten::relu"]
        layer = Faulty(call, device)
        if not message:
            with DeviceCheck(device):
                layer(x)
            return
        with pytest.raises(DeviceFault, match=message) as found, DeviceCheck(device):
            layer(x)
    assert " at unit/fake_cuda/test_device_check.py:" in str(found.value) and "lambda x" in str(found.value)


def test_a_fault_of_the_model_is_reported_with_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line of deco_scale, however deep below it the operator ran."""
    linspace = torch.linspace
    monkeypatch.setattr(torch, "linspace", lambda *args, device: linspace(*args))
    wanted = r"aten::linspace .*on the host.* at models/embeddings.py:\d+ in rope_angles: col_angles = torch.outer"
    with fake_cuda(), pytest.raises(DeviceFault, match=wanted), DeviceCheck("cuda"):
        rope_angles(2, 2, head_dim=8, scale="grid", device=torch.device("cuda"))


def test_non_blocking_copies_are_distinguished_from_blocking_ones() -> None:
    place = "unit/fake_cuda/test_device_check.py:test_non_blocking_copies_are_distinguished_from_blocking_ones"
    with fake_cuda():
        x = torch.empty(4, device="cuda")
        with DeviceCheck("cuda", allowed={place: ("compute", "send", "fetch")}) as check:
            pinned = torch.zeros(4, pin_memory=True)
            assert check.is_pinned(pinned) and check.is_pinned(pinned[1:].pin_memory())
            pinned.to("cuda", non_blocking=True)
            pinned.copy_(x, non_blocking=True)
            with pytest.raises(DeviceFault, match="with the host waiting"):
                pinned.to("cuda")
            with pytest.raises(DeviceFault, match="with the host waiting"):
                torch.zeros(4).to("cuda", non_blocking=True)
            with pytest.raises(DeviceFault, match="read on the host, which waits"):
                pinned.copy_(x)
            with pytest.raises(DeviceFault, match="read on the host, which waits"):
                torch.zeros(4).copy_(x, non_blocking=True)


def operators() -> dict[str, list[tuple[object, ...]]]:
    """Arguments for each custom operator: transposed and sliced tensors, bf16 and fp32."""
    from deco_scale.kernels.triton import adaln, losses, pixel_decoder, rope, swiglu

    assert all((adaln, losses, pixel_decoder, rope, swiglu))
    where = "cuda" if torch.cuda.is_available() else "cpu"

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=where).to(dtype)

    cases: dict[str, list[tuple[object, ...]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, part = made(2, 5, 24, dtype=dtype)[..., 8:16], made(2, 1, 24, dtype=dtype)[..., :8]
        crossed, dense = made(5, 2, 8, dtype=dtype).transpose(0, 1), made(2, 5, 8, dtype=dtype)
        qkv, angles = made(2, 5, 2, 3, 8, dtype=dtype), made(5, 4)
        q, kv, context = (
            made(2, 5, 2, 8, dtype=dtype),
            made(2, 9, 2, 8, dtype=dtype),
            made(4, 2, 2, 2, 8, dtype=dtype),
        )
        context = context.transpose(0, 1)
        weight, wide = made(8), made(8, dtype=dtype)
        image, transform = made(2, 3, 192, dtype=dtype), (made(64, 64), made(3, 3), made(3, 8, 8))
        patches, condition = made(2, 12, dtype=dtype), made(2, 4, 8, dtype=dtype)
        constant, weights = made(4, 8, dtype=dtype), made(8 * 8 * 2 + 24 * 8 + 4 * 8 + 24 + 8 * 3 + 3 * 8 + 3)
        rendered = (condition, constant, weights.to(dtype), 1, 1e-6)
        by_name: dict[str, list[tuple[object, ...]]] = {
            "norm_modulate": [(x, weight, part, part, 1e-6, False), (crossed, wide, None, None, 1e-6, True)],
            "norm_modulate_backward": [
                (crossed, x, x, weight, part, 1e-6, False), (x, None, crossed, wide, None, 1e-6, True),
            ],
            "residual_norm_modulate": [
                (x, part, crossed, weight, part, part, 1e-6, False),
                (crossed, part, x, wide, part, part, 1e-6, True),
            ],
            "residual_norm_modulate_backward": [
                (x, crossed, dense, part, x, weight, part, 1e-6, False, dtype),
                (dense, x, crossed, part, dense, wide, part, 1e-6, True, torch.float32),
            ],
            "qk_norm_rope": [
                (qkv, context, weight, wide, angles, 1e-6, False), (qkv, None, wide, weight, None, 1e-6, True),
            ],
            "qk_norm_rope_backward": [
                (q, kv, kv, qkv[..., :2, :], context[..., 0, :], weight, wide, angles, 1e-6, False),
                (q, q, q, qkv[..., :2, :], None, wide, weight, None, 1e-6, True),
            ],
            "gated_residual": [(x, part, crossed), (made(2, 5, 8), part, dense)],
            "gated_residual_backward": [(dense, part, x), (crossed, part, crossed)],
            "squared_error_sums": [(image, made(2, 3, 192), *transform, 8)],
            "squared_error_gradient": [(made(2), image, made(2, 3, 192), *transform, 8)],
            "swiglu": [(x,), (crossed,)],
            "swiglu_backward": [(x[..., :4], x), (crossed[..., ::2], crossed)],
            "render_pixels": [(patches, *rendered, dtype)],
            "render_pixels_backward": [
                (made(2, 12, dtype=dtype), patches, *rendered, with_patches) for with_patches in (False, True)
            ],
        }  # fmt: skip
        for name, arguments in by_name.items():
            cases.setdefault(name, []).extend(arguments)
    return cases


def test_every_custom_operator_is_what_its_fake_says() -> None:
    """Shapes, types, strides and devices, by torch's own checker; on a CPU through Triton's interpreter."""
    cases = operators()
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "deco_scale::" in name}
    assert {name.partition(".")[0] for name in names} == cases.keys()
    for name, arguments in cases.items():
        operator = getattr(torch.ops.deco_scale, name).default
        for given in arguments:
            torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))


def test_what_pytorch_caches_under_the_fake_device_is_its_own() -> None:
    """Its constructors, which ``torch.device`` as a context acts on: transformers asks there for ``meta``."""
    _device_constructors.cache_clear()
    with fake_cuda(), torch.device("cpu"):
        torch.empty(2)
    with torch.device("meta"):
        assert torch.tensor([1.0]).device.type == "meta"
