"""DPG-Bench: one grid of four images per prompt as its scorer reads them, and a table of its results.

``dpg_bench/compute_dpg_bench.py`` of ``TencentQQGYLab/ELLA`` scores every file of a folder; a file's name up to
the first dot is the prompt's id, and with ``--pic-num 4`` it cuts the image into 2 x 2 squares of
``--resolution`` pixels, row by row, without borders.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deco_scale.errors import ConfigError, as_config_error
from deco_scale.sampling.generate import GenerateFn, SampleRequest
from deco_scale.sampling.output_dir import encode_png, write_file
from deco_scale.sampling.prompts import NamedPrompt, read_lines

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
        png = encode_png(np.vstack([np.hstack(images[:GRID]), np.hstack(images[GRID:])]))
        write_file(folder / f"{prompt.id}.png", png, scratch=folder.parent)


@dataclass(frozen=True)
class DpgSummary:
    """The scorer's percentages: overall, of broad (L1) and detailed (L2) categories; number of scored grids."""

    overall: float
    broad: dict[str, float]
    detailed: dict[str, float]
    grids: int


_LINE = re.compile(r".*\.\w+((?:, [0-9.eE+-]+)+)")


def summarise(path: Path) -> DpgSummary:
    """Summary of the scorer's result file: a line per grid, then its own tables.

    Raises :class:`ConfigError` if the tables are missing (the scorer did not finish) or a number is damaged.
    """
    broad: dict[str, float] = {}
    detailed: dict[str, float] = {}
    tables = {"L1 category scores:": broad, "L2 category scores:": detailed}
    overall, grids, current = None, 0, None
    lines = read_lines(path)
    with as_config_error(f"{path}: "):
        for line in lines:
            if _LINE.fullmatch(line):
                grids += 1
            elif line in tables:
                current = tables[line]
            elif line.startswith("\t") and current is not None:
                name, _, value = line.strip().rpartition(": ")
                current[name] = float(value)
            elif line.startswith("DPG-Bench score: "):
                overall = float(line.partition(": ")[2])
    if overall is None:
        raise ConfigError(
            f"{path} has no line 'DPG-Bench score': the scorer did not finish, or this is another file"
        )
    return DpgSummary(overall, broad, detailed, grids)
