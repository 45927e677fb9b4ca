"""Reading safetensors files whose names are canonical, or canonical once a prefix is put before them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA
from checkpoints_tools.formats.tensor_files import Store
from checkpoints_tools.infer_config import check_sets
from deco_scale.errors import ConfigError


class BareReader:
    """Tensors whose names are canonical with ``prefix``; ``stated`` are settings that they must not contradict.

    Implements :class:`checkpoints_tools.base.CheckpointReader`.
    """

    meta = None

    def __init__(
        self, store: Store, *, kind: str, prefix: str = "", stated: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.format = store.path, kind
        self._store, self._prefix = store, prefix
        self.facts: dict[str, Any] = dict(store.facts)
        self.specs = {prefix + n: spec for n, spec in sorted(store.specs.items())}
        self.model = check_sets(self.specs, stated, where=str(self.path))
        unknown = [n for n in self.specs if not n.startswith((MODEL, EMA, REPA))]
        if unknown:
            raise ConfigError(f"{self.path}: unknown tensor {unknown[0]!r}")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self._store.read(name.removeprefix(self._prefix), rows)
