"""Fixtures of the unit tests."""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy
import pytest
import torch
from packaging.version import Version


def interpreter_needs_index() -> bool:
    """Whether Triton's interpreter is older than NumPy: 3.6 converts an array of one element with ``int``.

    NumPy 2.5 refuses that, so every loop with a run-time bound fails; Triton 3.7 squeezes the array first.
    """
    try:
        return Version(version("triton")) < Version("3.7") and Version(numpy.__version__) >= Version("2.5")
    except PackageNotFoundError:
        return False


@pytest.fixture(scope="session", autouse=True)
def interpreter_of_triton_3_6() -> Iterator[None]:
    """Lets the interpreter of Triton 3.6 count in loops under NumPy 2.5, as that of 3.7 does by itself."""
    if not interpreter_needs_index():
        yield
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch_with_index)
        yield


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """For sizes that have nothing for a second thread, here and in processes that are started."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    torch.set_num_threads(threads)
