"""Reading files of weights with the public release's names, or with ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from checkpoints_tools.base import EMA, MODEL, REPA, CheckpointReader, TensorSpec
from checkpoints_tools.formats import release
from checkpoints_tools.formats.tensor_files import Store
from checkpoints_tools.infer_config import check_repa_head, check_sets, infer_model, release_shapes
from deco_scale.checkpoint.format import check_shapes
from deco_scale.errors import ConfigError
from deco_scale.models import ModelConfig

RECORDED = ("in.", "out.", "grad.", "gradnorm.")
"""Tensors of a recorded parity test, which are stored beside the weights."""


class BareReader(CheckpointReader):
    """Tensors whose names are canonical with ``prefix``; ``stated`` are settings that they must not contradict."""

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


class ReleaseReader(CheckpointReader):
    """Tensors with the public release's names, translated by the table in ``release.py``.

    All tensors must be known, complete and of the inferred model's shapes. ``stated`` are settings that the
    tensors must not contradict.
    """

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
        # By our name: the release's, the rule between both, and which of the rule's tensors it is.
        self._parts: dict[str, tuple[str, release.Rule, int]] = {}
        for prefix, ours in ((release.DENOISER, MODEL), (release.EMA, EMA)):
            for rule in release.denoiser_rules(self.model):
                if prefix + rule.release in store.specs:
                    parts = {ours + name: (prefix + rule.release, rule, i) for i, name in enumerate(rule.ours)}
                    self._parts |= parts
        for name in names:
            if name.startswith(release.REPA):
                here = f"{REPA}layers.{name.removeprefix(release.REPA)}"
                self._parts[here] = name, release.Rule(name, (here,)), 0
        self.specs: dict[str, TensorSpec] = {}
        for name, (theirs, rule, _) in sorted(self._parts.items()):
            height, *others = store.specs[theirs].shape
            self.specs[name] = TensorSpec((height // len(rule.ours), *others), store.specs[theirs].dtype)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        theirs, rule, index = self._parts[name]
        if rule.is_plain:
            return self._store.read(theirs, rows)
        full = rule.split(self._store.read(theirs), self.model)[index]
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
