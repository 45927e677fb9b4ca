"""Reading files with the public release's tensor names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, TensorSpec
from checkpoints_tools.formats import release
from checkpoints_tools.formats.tensor_files import Store
from checkpoints_tools.infer_config import check_repa_head, infer_model, release_shapes
from deco_scale.checkpoint.format import check_shapes
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

RECORDED = ("in.", "out.", "grad.", "gradnorm.")
"""Tensors of a recorded parity test, which are stored beside the weights."""


@dataclass(frozen=True, slots=True)
class _Part:
    """A canonical tensor as a part of a release tensor: ``index`` among the rule's results."""

    stored: str
    rule: release.Rule | None
    index: int


class ReleaseReader:
    """Tensors with the public release's names, translated by the table in ``release.py``.

    All tensors must be known, complete and of the inferred model's shapes. ``stated`` are settings that the
    tensors must not contradict. Implements :class:`checkpoints_tools.base.CheckpointReader`.
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
        unknown = [n for n in names if not n.startswith(known)]
        if unknown or not names:
            what = f"unknown tensor {unknown[0]!r}" if unknown else "no tensor"
            raise ConfigError(f"{self.path}: {what}; the release's begin with {', '.join(known)}")
        self.model = self._infer(names, stated)
        self._parts = self._translate(names)
        self.specs = {n: self._spec(n) for n in sorted(self._parts)}

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        part = self._parts[name]
        if part.rule is None or part.rule.is_plain:
            return self._store.read(part.stored, rows)
        full = part.rule.split(self._store.read(part.stored), self.model)[part.index]
        return (full if rows is None else full[rows[0] : rows[1]]).clone()

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
        head = {n: self._store.specs[n].shape for n in names if n.startswith(release.REPA)}
        layers = {f"layers.{n.removeprefix(release.REPA)}": shape for n, shape in head.items()}
        check_repa_head(layers, models[0].dim, where=f"{self.path} ({release.REPA}*)")
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
