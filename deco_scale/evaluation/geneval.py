"""GenEval: pictures in the layout that its scorer reads, and a table of what the scorer found.

Layout of ``djghosh13/geneval`` (``generation/diffusers_generate.py``): for each line of the metadata file a folder
with its number in five digits, in it ``metadata.jsonl`` (that line's object) and ``samples/`` with pictures named
by their index within the prompt, in five digits.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deco_scale.errors import ConfigError
from deco_scale.evaluation.files import read_json_lines, write_png, write_whole
from deco_scale.evaluation.imagenet import PicturesFn
from deco_scale.sampling.generate import SampleRequest

PER_PROMPT = 4


class Task(NamedTuple):
    """A prompt, its number in the file, and its line as an object."""

    number: int
    prompt: str
    metadata: dict[str, Any]

    @property
    def folder(self) -> str:
        return f"{self.number:05d}"


def read_tasks(path: Path) -> list[Task]:
    """Tasks of an ``evaluation_metadata.jsonl``; an object without tag or prompt is a :class:`ConfigError`."""
    tasks = []
    for number, entry in enumerate(read_json_lines(path)):
        if not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("tag"), str):
            raise ConfigError(f"{path}: object {number + 1} has no prompt or no tag; expected GenEval's metadata")
        tasks.append(Task(number, entry["prompt"], entry))
    if not tasks:
        raise ConfigError(f"{path}: no prompt in it")
    return tasks


def write_metadata(tasks: Sequence[Task], folder: Path) -> None:
    """Each task's folder with its ``metadata.jsonl``, as far as it is not there."""
    for task in tasks:
        path = folder / task.folder / "metadata.jsonl"
        if not path.is_file():
            write_whole(path, json.dumps(task.metadata).encode(), scratch=folder)


def missing_images(tasks: Sequence[Task], folder: Path, per_prompt: int) -> list[tuple[Task, int]]:
    """Tasks and indices within them of the pictures that are not there."""
    return [(t, i) for t in tasks for i in range(per_prompt) if not _picture(folder, t, i).is_file()]


def generate_images(
    draw: PicturesFn, work: Sequence[tuple[Task, int]], folder: Path, *, on_picture: Callable[[], None]
) -> None:
    """Draw these pictures; the noise of each is seeded with its index within the prompt."""
    drawn = draw([SampleRequest(task.prompt, i, seed=i) for task, i in work])
    for (task, i), (_, pixels) in zip(work, drawn, strict=True):
        write_png(_picture(folder, task, i), pixels, scratch=folder)
        on_picture()


def _picture(folder: Path, task: Task, index: int) -> Path:
    return folder / task.folder / "samples" / f"{index:05d}.png"


@dataclass(frozen=True)
class Summary:
    """Right and all pictures by task, in the file's order, and over pictures and prompts."""

    tasks: dict[str, tuple[int, int]]
    pictures: tuple[int, int]
    prompts: tuple[int, int]

    @property
    def overall(self) -> float:
        """GenEval's score: the mean of the tasks' shares."""
        return sum(right / count for right, count in self.tasks.values()) / len(self.tasks)


def summarise(path: Path) -> Summary:
    """Summary of the scorer's ``results.jsonl`` (``evaluation/evaluate_images.py``).

    A prompt is right where any of its pictures is. Raises :class:`ConfigError` naming an object that is not one of
    the scorer's.
    """
    tasks: dict[str, tuple[int, int]] = {}
    prompts: dict[str, bool] = {}
    for number, entry in enumerate(read_json_lines(path), start=1):
        tag, correct, key = entry.get("tag"), entry.get("correct"), entry.get("metadata", entry.get("prompt"))
        if not isinstance(tag, str) or not isinstance(correct, bool) or not isinstance(key, str):
            raise ConfigError(
                f"{path}: object {number} lacks tag, correct or metadata; expected GenEval's results"
            )
        right, count = tasks.get(tag, (0, 0))
        tasks[tag] = (right + correct, count + 1)
        prompts[key] = prompts.get(key, False) or correct
    if not tasks:
        raise ConfigError(f"{path}: no result in it")
    right = sum(r for r, _ in tasks.values())
    count = sum(c for _, c in tasks.values())
    return Summary(tasks, (right, count), (sum(prompts.values()), len(prompts)))
