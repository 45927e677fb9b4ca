"""Sources whose files hold other names than the canonical checkpoint's: the release's, or our bare denoiser's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, TensorSpec
from checkpoints_tools.formats import release
from checkpoints_tools.formats.tensor_files import Store
from checkpoints_tools.infer_config import (
    check_shapes,
    infer_model,
    meta_state,
    model_of,
    release_shapes,
    repa_shapes,
)
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

RECORDED = ("in.", "out.", "grad.", "gradnorm.")
"""Tensors of a recorded parity test, which such a file holds beside the weights."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A canonical tensor as a part of a release tensor: ``index`` among the rule's results."""

    stored: str
    rule: release.Rule | None
    index: int


class ReleaseReader:
    """A store with the public release's names, translated through the one table in ``release.py``.

    All tensors must be known, complete and of the shapes that the inferred model has. ``stated`` are settings
    that the tensors must not contradict. Implements :class:`checkpoints_tools.base.Source`.
    """

    meta = None

    def __init__(self, store: Store, *, kind: str, stated: Mapping[str, Any] | None = None) -> None:
        self.path, self.format = store.path, f"release {kind}"
        self._store = store
        self.facts: dict[str, Any] = dict(store.facts)
        names = list(store.specs)
        if "golden" in store.facts:
            recorded = [n for n in names if n.startswith(RECORDED)]
            names = [n for n in names if not n.startswith(RECORDED)]
            self.facts = {"left out": f"{len(recorded)} tensors of a recorded test"}
        known = (release.DENOISER, release.EMA, release.REPA)
        strangers = [n for n in names if not n.startswith(known)]
        if strangers or not names:
            what = f"unknown tensor {strangers[0]!r}" if strangers else "no tensor"
            raise ConfigError(f"{self.path}: {what}; the release's begin with {', '.join(known)}")
        self.model = self._infer(names, stated)
        self._parts = self._translate(names)
        self.specs = {n: self._spec(n) for n in sorted(self._parts)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        part = self._parts[name]
        if part.rule is None or part.rule.plain:
            return self._store.read(part.stored, rows)
        whole = part.rule.split(self._store.read(part.stored), self.model)[part.index]
        return (whole if rows is None else whole[rows[0] : rows[1]]).clone()

    def _infer(self, names: list[str], stated: Mapping[str, Any] | None) -> ModelConfig:
        sets = [p for p in (release.DENOISER, release.EMA) if any(n.startswith(p) for n in names)]
        if not sets:
            raise ConfigError(f"{self.path} has neither {release.DENOISER}* nor {release.EMA}*")
        models = []
        for prefix in sets:
            shapes = {n.removeprefix(prefix): self._store.specs[n].shape for n in names if n.startswith(prefix)}
            where = f"{self.path} ({prefix}*)"
            cfg = infer_model(shapes, where=where, stated=stated)
            check_shapes(shapes, release_shapes(cfg), where=where)
            models.append(cfg)
        if models[0] != models[-1]:
            raise ConfigError(f"{self.path}: {sets[0]}* and {sets[-1]}* are of different models")
        head = {n.removeprefix(release.REPA): n for n in names if n.startswith(release.REPA)}
        if head:
            shapes = {f"layers.{n}": self._store.specs[full].shape for n, full in head.items()}
            last = shapes.get("layers.4.weight", (0,))
            check_shapes(shapes, repa_shapes(models[0].dim, last[0]), where=f"{self.path} ({release.REPA}*)")
        return models[0]

    def _translate(self, names: list[str]) -> dict[str, _Part]:
        parts: dict[str, _Part] = {}
        present = set(names)
        for prefix, ours in ((release.DENOISER, MODEL), (release.EMA, EMA)):
            for rule in release.denoiser_rules(self.model):
                if prefix + rule.release in present:
                    for index, name in enumerate(rule.ours):
                        parts[ours + name] = _Part(prefix + rule.release, rule, index)
        for name in names:
            if name.startswith(release.REPA):
                parts[f"{REPA}layers.{name.removeprefix(release.REPA)}"] = _Part(name, None, 0)
        return parts

    def _spec(self, name: str) -> TensorSpec:
        part = self._parts[name]
        stored = self._store.specs[part.stored]
        if part.rule is None or len(part.rule.ours) == 1:
            return stored
        return TensorSpec((stored.shape[0] // len(part.rule.ours), *stored.shape[1:]), stored.dtype)


class BareReader:
    """A store whose names are canonical once ``prefix`` is put before them.

    Implements :class:`checkpoints_tools.base.Source`.
    """

    meta = None

    def __init__(
        self, store: Store, *, kind: str, prefix: str = "", stated: Mapping[str, Any] | None = None
    ) -> None:
        self.path, self.format = store.path, kind
        self._store, self._prefix = store, prefix
        self.facts: dict[str, Any] = dict(store.facts)
        self.specs = {prefix + n: spec for n, spec in sorted(store.specs.items())}
        self.model = model_of(self.specs, stated, where=str(self.path))
        wanted = {n: tuple(t.shape) for n, t in meta_state(self.model).items()}
        for each in (MODEL, EMA):
            shapes = {n.removeprefix(each): s.shape for n, s in self.specs.items() if n.startswith(each)}
            if shapes:
                check_shapes(shapes, wanted, where=f"{self.path} ({each}*)")
        head = {n.removeprefix(REPA): s.shape for n, s in self.specs.items() if n.startswith(REPA)}
        if head:
            last = head.get("layers.4.weight", (0,))
            check_shapes(head, repa_shapes(self.model.dim, last[0]), where=f"{self.path} ({REPA}*)")
        strangers = [n for n in self.specs if not n.startswith((MODEL, EMA, REPA))]
        if strangers:
            raise ConfigError(f"{self.path}: unknown tensor {strangers[0]!r}")

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        return self._store.read(name.removeprefix(self._prefix), rows)
