"""DPG-Bench: one grid of four images per prompt as its scorer reads them, and a table of its results.

``dpg_bench/compute_dpg_bench.py`` of ``TencentQQGYLab/ELLA`` scores every file of a folder; a file's name up to
the first dot is the prompt's id, and with ``--pic-num 4`` it cuts the image into 2 x 2 squares of
``--resolution`` pixels, row by row, without borders.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deco_scale.errors import ConfigError
from deco_scale.sampling.generate import GenerateFn, SampleRequest
from deco_scale.sampling.output_dir import encode_png, write_file
from deco_scale.sampling.prompts import NamedPrompt

GRID = 2
PER_PROMPT = GRID * GRID


def missing_prompts(prompts: Sequence[NamedPrompt], folder: Path) -> list[NamedPrompt]:
    """Prompts without a grid in ``folder``."""
    return [prompt for prompt in prompts if not (folder / f"{prompt.id}.png").is_file()]


def generate_images(
    generate: GenerateFn, prompts: Sequence[NamedPrompt], folder: Path, *, on_image: Callable[[], None]
) -> None:
    """Generate four images of each prompt, their noise seeded with 0 to 3, as ``folder/<id>.png``.

    Temporary files are beside ``folder``, since the scorer reads every file in it.
    """
    generated = generate([SampleRequest(prompt.text, i, seed=i) for prompt in prompts for i in range(PER_PROMPT)])
    for prompt in prompts:
        images = []
        for _ in range(PER_PROMPT):
            images.append(next(generated)[1])
            on_image()
        png = encode_png(grid_of(np.stack(images)))
        write_file(folder / f"{prompt.id}.png", png, scratch=folder.parent)


def grid_of(images_PYXC: Any) -> Any:
    """Four images (4, Y, X, C) as one (2Y, 2X, C), row by row."""
    _, height, width, channels = images_PYXC.shape
    grid = images_PYXC.reshape(GRID, GRID, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(GRID * height, GRID * width, channels)


@dataclass(frozen=True)
class DpgSummary:
    """The scorer's percentages: overall, of broad (L1) and detailed (L2) categories; number of scored grids."""

    overall: float
    broad: dict[str, float]
    detailed: dict[str, float]
    grids: int


_LINE = re.compile(r".*\.\w+((?:, [0-9.eE+-]+)+)")
_HEADS = {"L1 category scores:": "broad", "L2 category scores:": "detailed"}


def summarise(path: Path) -> DpgSummary:
    """Summary of the scorer's result file: a line per grid, then its own tables.

    Raises :class:`ConfigError` if the tables are missing (the scorer did not finish) or a number is damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    tables: dict[str, dict[str, float]] = {"broad": {}, "detailed": {}}
    overall, grids, current = None, 0, None
    try:
        for line in lines:
            if _LINE.fullmatch(line):
                grids += 1
            elif line in _HEADS:
                current = tables[_HEADS[line]]
            elif line.startswith("\t") and current is not None:
                name, _, value = line.strip().rpartition(": ")
                current[name] = float(value)
            elif line.startswith("DPG-Bench score: "):
                overall = float(line.partition(": ")[2])
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    if overall is None:
        raise ConfigError(
            f"{path} has no line 'DPG-Bench score': the scorer did not finish, or this is another file"
        )
    return DpgSummary(overall, tables["broad"], tables["detailed"], grids)
