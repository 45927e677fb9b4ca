"""Validation of the page's requests on the server: one pure function from raw JSON values to a request.

The browser also limits its inputs, but nothing here relies on that.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from deco_scale.sampling.config import Solver

FIELDS = ("subject", "negative", "seed", "random", "steps", "guidance", "solver", "width", "height", "count")
"""The page's inputs in the order in which it sends them; ``subject`` is a prompt or a class number."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)
MAX_SEED = 2**31 - 1
_SHOWN_CHARS = 40


class RequestError(ValueError):
    """An invalid request; its message is shown to the visitor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationLimits:
    """Maxima of a request: sides in pixels, images, solver steps, guidance, prompt length in characters."""

    max_side: int = 1024
    max_images: int = 16
    max_steps: int = 200
    max_guidance: float = 30.0
    max_prompt_chars: int = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """A valid request; image n has ``seed + n``, and None means a random seed."""

    condition: str | int
    negative: str
    seed: int | None
    num_steps: int
    guidance: float
    solver: Solver
    height: int
    width: int
    count: int


def check_request(
    raw: Mapping[str, Any], limits: GenerationLimits, *, patch_size: int, num_classes: int
) -> ImageRequest:
    """A request from the values of :data:`FIELDS`; ``num_classes`` is 0 for a text model.

    Values may be any JSON, and what Python's parser adds to it (nan, infinities). Raises :class:`RequestError`
    naming the first invalid field and the allowed values.
    """
    condition: str | int
    if num_classes:
        condition = _integer("Class", raw["subject"], 0, num_classes - 1)
        if raw["negative"] not in (None, ""):
            raise RequestError("Negative prompt: not available for class models.")
        negative = ""
    else:
        condition = _text("Prompt", raw["subject"], limits.max_prompt_chars)
        if not condition.strip():
            raise RequestError("Prompt: it is empty.")
        negative = _text("Negative prompt", raw["negative"], limits.max_prompt_chars)
    if raw["random"] not in (True, False, None):
        raise RequestError(f"Random seed: {_shortened(raw['random'])} is not a boolean.")
    count = _integer("Images", raw["count"], 1, limits.max_images)
    solver = next((name for name in SOLVERS if name == raw["solver"]), None)
    if solver is None:
        raise RequestError(f"Solver: {_shortened(raw['solver'])} is not one of {', '.join(SOLVERS)}.")
    return ImageRequest(
        condition=condition,
        negative=negative,
        seed=None if raw["random"] else _integer("Seed", raw["seed"], 0, MAX_SEED - count),
        num_steps=_integer("Steps", raw["steps"], 1, limits.max_steps),
        guidance=_number("Guidance", raw["guidance"], 0, limits.max_guidance),
        solver=solver,
        height=_side("Height", raw["height"], limits.max_side, patch_size),
        width=_side("Width", raw["width"], limits.max_side, patch_size),
        count=count,
    )


def _number(name: str, value: Any, low: float, high: float) -> float:
    # In Python a bool is an int.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name}: {_shortened(value)} is not a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise RequestError(f"{name}: {value} is not a finite number.")
    if not low <= value <= high:
        raise RequestError(f"{name}: {_shortened(value)} is out of range, {low:g} to {high:g}.")
    return float(value)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise RequestError(f"{name}: {_shortened(value)} is not an integer.")
    return int(number)


def _side(name: str, value: Any, maximum: int, patch_size: int) -> int:
    side = _integer(name, value, patch_size, maximum)
    if side % patch_size:
        raise RequestError(f"{name}: {side} is not a multiple of the model's patch, {patch_size} pixels.")
    return side


def _text(name: str, value: Any, maximum: int) -> str:
    if not isinstance(value, str):
        raise RequestError(f"{name}: {_shortened(value)} is not text.")
    if len(value) > maximum:
        raise RequestError(f"{name}: {len(value)} characters are too many, the maximum is {maximum}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RequestError(f"{name}: it has a lone surrogate.") from None
    if any(ord(character) < 32 and character not in "\t\n\r" for character in value):
        raise RequestError(f"{name}: it has control characters.")
    return value


def _shortened(value: Any) -> str:
    """A value for a message, shortened; of containers only the type."""
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
