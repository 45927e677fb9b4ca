"""GenEval: images in the layout that its scorer reads, and a table of its results.

Layout of ``djghosh13/geneval`` (``generation/diffusers_generate.py``): for each line of the metadata file a folder
with its number in five digits, in it ``metadata.jsonl`` (that line's object) and ``samples/`` with images named
by their index within the prompt, in five digits.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deco_scale.errors import ConfigError
from deco_scale.sampling.generate import GenerateFn, SampleRequest
from deco_scale.sampling.output_dir import encode_png, write_file
from deco_scale.sampling.prompts import read_lines

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
    """Tasks of an ``evaluation_metadata.jsonl``; raises :class:`ConfigError` for a line without tag or prompt."""
    tasks = []
    for number, entry in enumerate(read_json_lines(path)):
        if not isinstance(entry.get("prompt"), str) or not isinstance(entry.get("tag"), str):
            raise ConfigError(f"{path}: object {number + 1} has no prompt or no tag; expected GenEval's metadata")
        tasks.append(Task(number, entry["prompt"], entry))
    if not tasks:
        raise ConfigError(f"{path}: no prompt in it")
    return tasks


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file with one JSON object per line; raises :class:`ConfigError` naming a bad line."""
    entries = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(entry, dict):
            raise ConfigError(f"{path}, line {number}: not a JSON object")
        entries.append(entry)
    return entries


def write_metadata(tasks: Sequence[Task], folder: Path) -> None:
    """Write each task's ``metadata.jsonl``, if it does not exist."""
    for task in tasks:
        path = folder / task.folder / "metadata.jsonl"
        if not path.is_file():
            write_file(path, json.dumps(task.metadata).encode(), scratch=folder)


def missing_images(tasks: Sequence[Task], folder: Path, per_prompt: int) -> list[tuple[Task, int]]:
    """Task and index within it of each image that does not exist."""
    return [(t, i) for t in tasks for i in range(per_prompt) if not _image_path(folder, t, i).is_file()]


def generate_images(
    generate: GenerateFn, work: Sequence[tuple[Task, int]], folder: Path, *, on_image: Callable[[], None]
) -> None:
    """Generate these images; the noise of each is seeded with its index within the prompt."""
    generated = generate([SampleRequest(task.prompt, i, seed=i) for task, i in work])
    for (task, i), (_, pixels) in zip(work, generated, strict=True):
        write_file(_image_path(folder, task, i), encode_png(pixels), scratch=folder)
        on_image()


def _image_path(folder: Path, task: Task, index: int) -> Path:
    return folder / task.folder / "samples" / f"{index:05d}.png"


@dataclass(frozen=True)
class GenEvalSummary:
    """(correct, count) by task, in the file's order, and over all images and all prompts."""

    tasks: dict[str, tuple[int, int]]
    images: tuple[int, int]
    prompts: tuple[int, int]

    @property
    def overall(self) -> float:
        """GenEval's score: the mean over tasks of the share of correct images."""
        return sum(correct / count for correct, count in self.tasks.values()) / len(self.tasks)


def summarise(path: Path) -> GenEvalSummary:
    """Summary of the scorer's ``results.jsonl`` (``evaluation/evaluate_images.py``).

    A prompt is correct if any of its images is. Raises :class:`ConfigError` naming a line of another kind.
    """
    tasks: dict[str, tuple[int, int]] = {}
    prompts: dict[str, bool] = {}
    for number, entry in enumerate(read_json_lines(path), start=1):
        tag, is_correct, key = entry.get("tag"), entry.get("correct"), entry.get("metadata", entry.get("prompt"))
        if not isinstance(tag, str) or not isinstance(is_correct, bool) or not isinstance(key, str):
            raise ConfigError(
                f"{path}: object {number} lacks tag, correct or metadata; expected GenEval's results"
            )
        correct, count = tasks.get(tag, (0, 0))
        tasks[tag] = (correct + is_correct, count + 1)
        prompts[key] = prompts.get(key, False) or is_correct
    if not tasks:
        raise ConfigError(f"{path}: no result in it")
    correct, count = (sum(column) for column in zip(*tasks.values(), strict=True))
    return GenEvalSummary(tasks, (correct, count), (sum(prompts.values()), len(prompts)))
