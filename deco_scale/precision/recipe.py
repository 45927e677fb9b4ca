"""Resolves ``precision.fp8_*`` to one FP8 backend and recipe for a machine.

Sources: Transformer Engine 2.x, ``pytorch/quantization.py`` (which chip has which recipe) and the API page of
``te.autocast`` (sizes); torchao 0.18, ``float8`` (compute capability 8.9, sizes by 16).
"""

import importlib.util
from dataclasses import dataclass
from typing import Any, Literal

import torch

from deco_scale.errors import ConfigError
from deco_scale.precision.config import PrecisionConfig

Backend = Literal["te", "torchao"]
Recipe = Literal["delayed", "current", "block", "mxfp8"]
CHIPS = {"a100": (8, 0), "l40s": (8, 9), "h100": (9, 0), "h200": (9, 0), "b200": (10, 0)}
"""Compute capability of the GPUs that can be planned for."""
TE_INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]'"
_INSTALL = {"te": TE_INSTALL, "torchao": "pip install torchao"}
_BLOCK_CUDA = (12, 9)
"""First CUDA version whose cuBLAS has block-scaled products for Hopper."""
# Transformer Engine documents 16; its own check would take 8 tokens.
_MULTIPLES: dict[Recipe, int] = {"delayed": 16, "current": 16, "block": 128, "mxfp8": 32}


@dataclass(frozen=True, slots=True)
class Machine:
    """Facts that FP8 depends on; ``capability`` is None without a GPU, ``cuda`` None without CUDA."""

    capability: tuple[int, int] | None
    cuda: tuple[int, int] | None
    te: bool
    torchao: bool


@dataclass(frozen=True, slots=True)
class Fp8Choice:
    """Backend and recipe; ``block`` scales 1 x 128 and 128 x 128 blocks, ``mxfp8`` 32 values by a power of two."""

    backend: Backend
    recipe: Recipe
    emulate: bool = False

    @property
    def multiple(self) -> int:
        """Tokens of a micro-batch, and input and output features of a linear, must be multiples of this."""
        return _MULTIPLES[self.recipe]

    @property
    def formats(self) -> str:
        """Forward and backward number formats, for the log."""
        return "fp8 e4m3" if self.recipe in ("block", "mxfp8") else "fp8 e4m3, gradients e5m2"

    def __str__(self) -> str:
        return f"{self.backend}, {self.recipe} scaling{', emulated' if self.emulate else ''}"


def planned_machine(chip: str) -> Machine:
    """A machine with a GPU of :data:`CHIPS`, a recent CUDA and both backends, to plan for."""
    if chip not in CHIPS:
        raise ConfigError(f"chip {chip}: possible are {', '.join(CHIPS)}")
    return Machine(capability=CHIPS[chip], cuda=_BLOCK_CUDA, te=True, torchao=True)


def resolve_fp8(cfg: PrecisionConfig, machine: Machine) -> Fp8Choice:
    """Backend and recipe of ``cfg`` on ``machine``; raises :class:`ConfigError` with the possible settings.

    ``auto`` takes Transformer Engine if it is installed, MXFP8 on compute capability 10, whose tensor cores scale
    blocks themselves, and current scaling elsewhere: Hopper scales blocks of 128 outside of its tensor cores, and
    we have no measurement in favour of that.
    """
    if cfg.fp8_emulate:
        if not machine.torchao:
            raise ConfigError("precision.fp8_emulate=true needs torchao: pip install torchao")
        return Fp8Choice("torchao", "current", emulate=True)
    if machine.capability is None or machine.capability < (8, 9):
        has = "has none" if machine.capability is None else "has {}.{}".format(*machine.capability)
        raise ConfigError(
            "precision.compute=fp8 needs a GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell), this "
            f"machine {has}; possible: bf16, fp32, or precision.fp8_emulate=true to test the wiring"
        )
    wanted = _INSTALL if cfg.fp8_backend == "auto" else (cfg.fp8_backend,)
    backend = next((name for name in wanted if getattr(machine, name)), None)
    if backend is None:
        install = " or ".join(_INSTALL[name] for name in wanted)
        raise ConfigError(f"precision.compute=fp8 with fp8_backend={cfg.fp8_backend} needs {install}")
    if backend == "torchao":
        if cfg.fp8_recipe not in ("auto", "current"):
            raise ConfigError(
                f"precision.fp8_recipe={cfg.fp8_recipe} needs Transformer Engine: {TE_INSTALL}; "
                "possible with torchao: auto, current"
            )
        return Fp8Choice("torchao", "current")
    return Fp8Choice("te", _te_recipe(cfg, machine))


def _te_recipe(cfg: PrecisionConfig, machine: Machine) -> Recipe:
    assert machine.capability is not None
    if machine.capability[0] == 10 and cfg.fp8_recipe in ("auto", "block"):
        return "mxfp8"
    if cfg.fp8_recipe != "block":
        return "current" if cfg.fp8_recipe == "auto" else cfg.fp8_recipe
    if machine.capability[0] == 9 and machine.cuda is not None and machine.cuda >= _BLOCK_CUDA:
        return "block"
    raise ConfigError(
        "precision.fp8_recipe=block needs compute capability 9.x with CUDA 12.9 or newer, or 10.x; this machine "
        "has {}.{} with CUDA {}; possible: auto, current, delayed".format(
            *machine.capability, "{}.{}".format(*machine.cuda) if machine.cuda else "none"
        )
    )


def choose_fp8(cfg: PrecisionConfig, device: torch.device) -> Fp8Choice:
    """:func:`resolve_fp8` for ``device``; imports Transformer Engine to see that it works."""
    major, _, minor = (torch.version.cuda or "").partition(".")
    machine = Machine(
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        cuda=(int(major), int(minor)) if major else None,
        te=importlib.util.find_spec("transformer_engine") is not None,
        torchao=importlib.util.find_spec("torchao") is not None,
    )
    choice = resolve_fp8(cfg, machine)
    if choice.backend == "te":
        import_te()
    return choice


def import_te() -> Any:
    """The module that wraps Transformer Engine; raises :class:`ConfigError` with the way to install it."""
    try:
        return importlib.import_module("deco_scale.precision.transformer_engine")
    except (ImportError, RuntimeError, OSError) as error:
        # A build for another PyTorch or CUDA raises any of the three.
        raise ConfigError(f"Transformer Engine cannot be imported ({error}); {TE_INSTALL}") from error
