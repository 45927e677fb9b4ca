"""A device that is not there: tensors on ``cuda`` or ``meta`` have shapes and types, but no values.

Under :func:`fake_cuda` tensors say that they are on ``cuda`` (``FakeTensorMode``); under :func:`meta_device` they
are on ``meta``, where autograd runs as well. Within ``DeviceCheck`` real code shows which operators it
would run, on which devices and in which types. Nothing here shows what a GPU computes.
"""

import contextlib
import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map_only


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Tensors on ``cuda`` without values, with a GPU or without one, and in builds of PyTorch without CUDA.

    What a driver would have to answer has a stand-in where there is none: see :func:`_stand_ins`.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # PyTorch caches its constructors at the first use; these must be its own, not the stand-in below.
    _device_constructors()
    with _device_guard(), _own_constants(), pytest.MonkeyPatch.context() as patch:
        # Page-locked memory is asked for in a call of its own, which DeviceCheck sees.
        patch.setattr(torch, "tensor", _tensor)
        if not torch.cuda.is_available():
            _stand_ins(patch, "cuda")
        with mode:
            yield


@contextlib.contextmanager
def meta_device() -> Iterator[None]:
    """Tensors on ``meta``, whose backward runs; autocast is imitated, since PyTorch has none for this device."""
    with _own_constants(), pytest.MonkeyPatch.context() as patch:
        _stand_ins(patch, "meta")
        yield


@contextlib.contextmanager
def _own_constants() -> Iterator[None]:
    """What is computed once per device is computed anew, and no tensor without values is left to others."""
    from deco_scale.kernels.triton import adamw
    from deco_scale.objectives import frequency

    cached = (
        frequency.dct_matrix, frequency.colour_matrix, frequency.block_transform, frequency.frequency_weights,
        adamw._chunks,
    )  # fmt: skip
    for function in cached:
        function.cache_clear()
    try:
        yield
    finally:
        for function in cached:
            function.cache_clear()


@contextlib.contextmanager
def _device_guard() -> Iterator[None]:
    """A guard of CUDA devices that does nothing, which builds of PyTorch without CUDA lack.

    ``FakeTensorMode`` puts one in place of CUDA's own where there is no device, but not in builds without CUDA:
    there a slice of a fake tensor fails. The guard of lazy tensors, which counts no device either, stands for
    CUDA's own for that moment.
    """
    if torch.version.cuda is not None or torch.version.hip is not None:
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    registry = (ctypes.c_void_p * (_LAZY + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, registry[_CUDA] = registry[_CUDA], registry[_LAZY]
    try:
        torch._C._ensureCUDADeviceGuardSet()
        assert registry[_CUDA] != registry[_LAZY], "PyTorch has not put a guard in place"
        yield
    finally:
        registry[_CUDA] = before


# c10/core/DeviceType.h
_CUDA, _LAZY = 1, 17


def _stand_ins(patch: pytest.MonkeyPatch, device: str) -> None:
    """In place of what asks a driver, or exists for real devices only.

    - ``torch.autocast("cuda")`` switches itself off without a GPU: switched on by hand, with PyTorch's own rules;
    - attention: PyTorch chooses its kernel by the GPU; here flash, or cuDNN where it alone is allowed, and the
      memory-efficient one with a mask;
    - generators of random numbers: one of the CPU, since nothing is drawn;
    - the current stream: records nothing.
    """
    from deco_scale.kernels.triton import pixel_decoder as triton_pixel_decoder

    patch.setattr(torch, "autocast", _autocast_by_hand)
    patch.setattr(torch.nn.functional, "scaled_dot_product_attention", _attention)
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(torch.cuda, "current_stream", lambda device=None: _Stream())
    if device == "meta":
        enabled, dtype = torch.is_autocast_enabled, torch.get_autocast_dtype
        narrow = torch.bfloat16
        patch.setattr(torch, "is_autocast_enabled", lambda t: _autocast_on_meta() if t == "meta" else enabled(t))
        available = torch.amp.is_autocast_available
        patch.setattr(torch.amp, "is_autocast_available", lambda t: t == "meta" or available(t))
        patch.setattr(torch, "get_autocast_dtype", lambda t: narrow if t == "meta" else dtype(t))
        # Compiled kernels refuse devices but CUDA; on meta none is launched.
        patch.setattr(triton_pixel_decoder, "forward_kernel", None)


class _Generator(torch.Generator):
    def __new__(cls, device: torch.device | str = "cpu") -> "_Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


_make = torch.tensor


def _tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
    made = _make(*args, **kwargs)
    return made.pin_memory() if pin_memory else made


class _Stream:
    def record_event(self) -> "_Stream":
        return self

    def synchronize(self) -> None:
        pass


_sdpa = torch.nn.functional.scaled_dot_product_attention


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    if q.device.type == "cpu":
        return _sdpa(q, k, v, attn_mask, **options)
    scale = options.get("scale")
    if attn_mask is not None:
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*q.shape[:3], k.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, False, scale=scale)[0]
    if torch.backends.cuda.flash_sdp_enabled():
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[0]
    assert torch.backends.cuda.cudnn_sdp_enabled()
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, q.requires_grad, scale=scale)[0]


@contextlib.contextmanager
def _autocast_by_hand(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True) -> Iterator[None]:
    if device_type == "meta":
        with _MetaAutocast(enabled):
            yield
        return
    before = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, enabled)
    torch.set_autocast_dtype(device_type, dtype or before[1])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device_type, before[0])
        torch.set_autocast_dtype(device_type, before[1])


class _MetaAutocast(TorchFunctionMode):
    """The rules of CUDA's autocast to bfloat16 for the functions that are used here.

    That they are the same is tested by the operators that the same code runs on ``cuda``.
    """

    _NARROW = frozenset({
        torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.einsum,
        _attention,
    })  # fmt: skip
    _WIDE = frozenset({
        torch.nn.functional.layer_norm, torch.nn.functional.mse_loss, torch.nn.functional.cosine_similarity,
        torch.exp, torch.pow, Tensor.pow, Tensor.__pow__, torch.rsqrt, torch.softmax, Tensor.softmax,
    })  # fmt: skip
    _WIDEST = frozenset({torch.addcmul})
    active: list[bool] = []

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self._enabled = enabled

    def __enter__(self) -> Any:
        self.active.append(self._enabled)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.active.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype: torch.dtype | None = None
        if _autocast_on_meta():
            if func in self._NARROW:
                dtype = torch.bfloat16
            elif func in self._WIDE:
                dtype = torch.float32
            elif func in self._WIDEST:
                floats = [x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
                dtype = torch.float32 if torch.float32 in floats else None
        if dtype is not None:
            cast = lambda x: x.to(dtype) if x.is_floating_point() else x  # noqa: E731
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
        return func(*args, **kwargs)


def _autocast_on_meta() -> bool:
    return bool(_MetaAutocast.active) and _MetaAutocast.active[-1]
