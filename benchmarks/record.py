"""Result files with their origin (date, commit, hardware, versions), and a bar chart if there are bars."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipeline.storage.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def origin() -> dict[str, Any]:
    """Date, commit, machine and Python."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def write(result: dict[str, Any], folder: Path, name: str, console: Console) -> Path:
    """One dated JSON file in ``folder``; says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{result['date']}.json"
    write_json(path, result)
    console.print(f"written to {path}", soft_wrap=True)
    return path


def write_json(path: Path, content: Any) -> None:
    """Write ``path`` in one move, so that a kill leaves the earlier file or the new one."""
    atomic_write(path, (json.dumps(content, indent=2, default=str) + "\n").encode(), durable=False)


def draw_bars(groups: Mapping[str, Mapping[str, float]], path: Path, *, title: str, unit: str) -> None:
    """Horizontal bars as PNG: a colour for each group, a row for each name that any group has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    height = 0.8 / len(groups)
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.4 * len(names) * max(1, len(groups) / 2)))
    for number, (group, values) in enumerate(groups.items()):
        rows = [place + number * height for place, name in enumerate(names) if name in values]
        bars = axes.barh(rows, [values[name] for name in names if name in values], height, label=group)
        axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
    axes.set_yticks([place + height * (len(groups) - 1) / 2 for place in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.margins(x=0.12)
    axes.set_title(title, fontsize=10)
    if len(groups) > 1:
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def commit() -> str:
    """The commit of this tree, with ``+`` where the tree differs from it.

    Where git cannot tell (it is not installed, the tree has no ``.git`` or belongs to another user) it is the
    environment variable ``DECO_COMMIT``, else ``unknown``.
    """
    # Without a .git of its own the tree may lie inside of another repository, whose commit is not ours.
    if _git("rev-parse", "--show-prefix") == "":
        found = _git("rev-parse", "--short", "HEAD")
        if found:
            return found + ("+" if _git("status", "--porcelain", "-uno") else "")
    return os.environ.get("DECO_COMMIT") or "unknown"


def _git(*arguments: str) -> str | None:
    """What git prints, or None where it is missing, hangs or fails."""
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
