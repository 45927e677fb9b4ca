"""Every operator of a run looked at: tensors of the planned device alone, and no value read on the host."""

import linecache
import sys
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support import ROOT

_PROJECT = str(ROOT / "deco_scale") + "/"
_TESTS = str(ROOT / "tests") + "/"
_HELPERS = (__file__, str(ROOT / "tests" / "support" / "fake_cuda.py"))

_READS = frozenset(
    "aten::" + name
    for name in (
        "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero",
        "repeat_interleave",
    )
)  # fmt: skip

Allowed = Mapping[str, Collection[str]]
"""Where tensors of the host are planned, as ``file:function`` below ``deco_scale``, and what may be done there.

``compute``: with tensors of the host alone; ``send``: to the device, from page-locked memory and without waiting;
``send_pageable``: to the device, which holds up the host; ``fetch``: from the device into page-locked memory,
without waiting; ``read``: from the device with the host waiting; ``value``: a number of the device, 0 here.
"""


def reads_host(func: Any, args: Any) -> bool:
    """Whether an operator needs values of its inputs on the host: a number, or a shape that depends on them."""
    name = func._schema.name
    if name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return name in _READS


class DeviceFault(AssertionError):
    """An operator that the plan does not have: its name, what is wrong, and the line that called it."""


class Place(NamedTuple):
    """A line of the project: ``file`` below its root's package."""

    file: str
    function: str
    line: int
    path: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.function}"

    def __str__(self) -> str:
        source = linecache.getline(self.path, self.line).strip()
        backward = f" (backward, {_node()})" if _node() else ""
        return f"{self.file}:{self.line} in {self.function}{backward}: {source}"


def _place() -> Place:
    """The innermost line of ``deco_scale`` that runs, or of the tests where none does."""
    frame, other = sys._getframe(2), None
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_PROJECT):
            return Place(path[len(_PROJECT) :], frame.f_code.co_qualname, frame.f_lineno, path)
        if other is None and path.startswith(_TESTS) and path not in _HELPERS:
            other = Place(path[len(_TESTS) :], frame.f_code.co_qualname, frame.f_lineno, path)
        frame = frame.f_back  # type: ignore[assignment]
    return other or Place("unknown", "unknown", 0, "")


class Operand(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]


class Call(NamedTuple):
    """An operator that ran on the device, with the tensors that it took and made."""

    name: str
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    place: Place
    node: str
    """Of autograd, in backward."""

    @property
    def floats(self) -> set[torch.dtype]:
        return {operand.dtype for operand in self.inputs if operand.dtype.is_floating_point}

    def __str__(self) -> str:
        taken = ", ".join(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in self.inputs)
        return f"{self.name}({taken}) at {self.place}"


class DeviceCheck(TorchDispatchMode):
    """Raises :class:`DeviceFault` for whatever is not planned on ``device``; ``calls`` has the rest.

    A tensor of the host is a fault even with no dimension, which PyTorch would take: each is a launch with a value
    that the host holds, and a graph captured from it keeps that value for ever. Numbers of Python are none.

    Tensors of the host hold values while those of the device have none, so that planned work on the host (a
    sampler's times, packing of a batch) runs as ever. What is fetched from the device is zero. Nothing is
    page-locked, which takes a GPU: it is noted which tensors would be.
    """

    def __init__(self, device: str, *, allowed: Allowed | None = None) -> None:
        super().__init__()
        self.device = device
        self.allowed: Allowed = allowed or {}
        self.calls: list[Call] = []
        self.host_calls: set[str] = set()
        """Places where tensors of the host were at work, of those that are planned."""
        # Page-locked storages, held so that no other takes the address.
        self._pinned: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func._schema.name
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        about_types = not inputs and not any("Tensor" in str(one.type) for one in func._schema.returns)
        # PyTorch 2.11's checkpoint hangs its hooks on an empty tensor of the host.
        empty = name == "aten::empty" and list(args[0]) == [0]
        if name.startswith(("prim::", "profiler::")) or about_types or empty:
            return func(*args, **kwargs)
        place, target = _place(), kwargs.get("device")
        on_device = bool(inputs) if target is None else torch.device(target).type == self.device
        if not on_device or any(x.device.type != self.device for x in inputs):
            return self._with_host(func, args, kwargs, inputs, place)
        if reads_host(func, args):
            if "value" in self.allowed.get(place.key, ()) and name == "aten::_local_scalar_dense":
                self.host_calls.add(place.key)
                return 0
            raise DeviceFault(f"{name} reads a value on the host, at {place}")
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for x in outputs:
            if x.device.type != self.device:
                raise DeviceFault(f"{name} makes a tensor on {x.device}, the plan says {self.device}, at {place}")
        self.calls.append(Call(name, _operands(inputs), _operands(outputs), place, _node()))
        return out

    def _with_host(self, func: Any, args: Any, kwargs: Any, inputs: list[Tensor], place: Place) -> Any:
        name, planned = func._schema.name, self.allowed.get(place.key, ())
        kind = self._kind(name, args, kwargs, inputs)
        if kind not in planned:
            # Where the host may wait, it need not.
            kind = next((k for k in _WEAKER.get(kind, ()) if k in planned), kind)
        if kind not in planned:
            devices = ", ".join(f"{x.dtype}{list(x.shape)} on {x.device}" for x in inputs) or "no tensor"
            raise DeviceFault(
                f"{name} ({_WORDS[kind]}) takes {devices}; the plan says {self.device} alone, at {place}"
            )
        self.host_calls.add(place.key)
        if kind == "compute":
            return self._on_host(func, args, kwargs)
        if kind in ("fetch", "read"):
            if name == "aten::copy_":
                return args[0]
            with unset_fake_temporarily():
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return func(*args, **kwargs)

    def _kind(self, name: str, args: Any, kwargs: Any, inputs: list[Tensor]) -> str:
        """Which of the kinds of :data:`Allowed` an operator is that has to do with the host."""
        here = {x.device.type for x in inputs}
        if name not in ("aten::_to_copy", "aten::copy_"):
            return "compute" if here <= {"cpu"} and kwargs.get("device", _CPU) in (None, _CPU) else "mix"
        if name == "aten::copy_":
            target, source, waits = args[0], args[1], not (len(args) > 2 and args[2])
        else:
            target, source, waits = None, args[0], not kwargs.get("non_blocking", False)
        to_host = target.device.type == "cpu" if target is not None else kwargs.get("device", _CPU) == _CPU
        if source.device.type == "cpu":
            if to_host:
                return "compute"
            return "send_pageable" if self.device == "cuda" and (waits or not self.is_pinned(source)) else "send"
        return "fetch" if target is not None and not waits and self.is_pinned(target) else "read"

    def is_pinned(self, tensor: Tensor) -> bool:
        if self.device != "cuda":
            return True
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func._schema.name
        with unset_fake_temporarily():
            if name == "aten::is_pinned":
                return args[0].untyped_storage().data_ptr() in self._pinned
            pinned = name == "aten::_pin_memory" or bool(kwargs.get("pin_memory"))
            if name == "aten::_pin_memory":
                out = args[0].clone()
            else:
                out = func(*args, **({**kwargs, "pin_memory": False} if pinned else kwargs))
            if pinned:
                self._pinned[out.untyped_storage().data_ptr()] = out
            return out


_CPU = torch.device("cpu")
_WEAKER = {"send": ("send_pageable",), "fetch": ("read",)}
_WORDS = {
    "compute": "on the host",
    "mix": "of two devices",
    "send": "copied to the device",
    "send_pageable": "copied to the device with the host waiting",
    "fetch": "copied to the host",
    "read": "read on the host, which waits",
}


def _node() -> str:
    node = torch._C._current_autograd_node()
    return "" if node is None else node.name()


def _operands(tensors: list[Tensor]) -> tuple[Operand, ...]:
    return tuple(Operand(x.dtype, tuple(x.shape)) for x in tensors)
