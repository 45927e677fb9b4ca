"""What a visitor of the page asks for, checked on the server: one pure function from raw JSON values to an order.

The browser's own limits are a courtesy to people; nothing here relies on them.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

from deco_scale.sampling.config import Solver

FIELDS = ("subject", "negative", "seed", "random", "steps", "guidance", "solver", "width", "height", "count")
"""Names of the page's inputs, in the order in which it sends them; ``subject`` is a prompt or a class number."""
SOLVERS: tuple[Solver, ...] = get_args(Solver)
MAX_SEED = 2**31 - 1
_SHOWN_CHARS = 40


class CheckError(ValueError):
    """An order that cannot be; its text is for the visitor, and plain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What the page allows: sides in pixels, pictures and solver steps of an order, lengths in characters."""

    max_side: int = 1024
    max_pictures: int = 16
    max_steps: int = 200
    max_guidance: float = 30.0
    max_prompt_chars: int = 1000

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """Pictures to draw, all checks passed; picture n has ``seed + n``, a ``seed`` of None is left to chance."""

    condition: str | int
    negative: str
    seed: int | None
    num_steps: int
    guidance: float
    solver: Solver
    height: int
    width: int
    count: int


def check_request(raw: Mapping[str, Any], limits: Limits, *, patch_size: int, num_classes: int) -> ImageRequest:
    """The order that the values of :data:`FIELDS` mean; ``num_classes`` is 0 for a text model.

    Values may be anything that JSON has, and what Python's parser adds (nan, infinities). Raises
    :class:`CheckError` naming the first field that is wrong, and what is allowed.
    """
    condition: str | int
    if num_classes:
        condition = _whole("Class", raw["subject"], 0, num_classes - 1)
        if raw["negative"] not in (None, ""):
            raise CheckError("Negative prompt: this model draws classes and takes none.")
        negative = ""
    else:
        condition = _text("Prompt", raw["subject"], limits.max_prompt_chars)
        if not condition.strip():
            raise CheckError("Prompt: it is empty, say what to draw.")
        negative = _text("Negative prompt", raw["negative"], limits.max_prompt_chars)
    if raw["random"] not in (True, False, None):
        raise CheckError(f"Random seed: {_told(raw['random'])} is neither yes nor no.")
    count = _whole("Pictures", raw["count"], 1, limits.max_pictures)
    solver = next((name for name in SOLVERS if name == raw["solver"]), None)
    if solver is None:
        raise CheckError(f"Solver: {_told(raw['solver'])} is none of {', '.join(SOLVERS)}.")
    return ImageRequest(
        condition=condition,
        negative=negative,
        seed=None if raw["random"] else _whole("Seed", raw["seed"], 0, MAX_SEED - count),
        num_steps=_whole("Steps", raw["steps"], 1, limits.max_steps),
        guidance=_number("Guidance", raw["guidance"], 0, limits.max_guidance),
        solver=solver,
        height=_side("Height", raw["height"], limits.max_side, patch_size),
        width=_side("Width", raw["width"], limits.max_side, patch_size),
        count=count,
    )


def _number(name: str, value: Any, low: float, high: float) -> float:
    # A bool is an int in Python, not on a page.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckError(f"{name}: {_told(value)} is not a number.")
    if isinstance(value, float) and not math.isfinite(value):
        raise CheckError(f"{name}: {value} is not a finite number.")
    if not low <= value <= high:
        raise CheckError(f"{name}: {_told(value)} is out of range; allowed are {low:g} to {high:g}.")
    return float(value)


def _whole(name: str, value: Any, low: int, high: int) -> int:
    number = _number(name, value, low, high)
    if number != int(number):
        raise CheckError(f"{name}: {_told(value)} is not a whole number.")
    return int(number)


def _side(name: str, value: Any, most: int, patch_size: int) -> int:
    side = _whole(name, value, patch_size, most)
    if side % patch_size:
        raise CheckError(f"{name}: {side} is not a multiple of the model's patch, {patch_size} pixels.")
    return side


def _text(name: str, value: Any, most: int) -> str:
    if not isinstance(value, str):
        raise CheckError(f"{name}: {_told(value)} is not text.")
    if len(value) > most:
        raise CheckError(f"{name}: {len(value)} characters are too many; at most {most} are allowed.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise CheckError(f"{name}: it holds half of a character (a lone surrogate).") from None
    if any(ord(character) < 32 and character not in "\t\n\r" for character in value):
        raise CheckError(f"{name}: it holds control characters.")
    return value


def _told(value: Any) -> str:
    """A value in a message, cut short; of containers only that they are some."""
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "..."
