"""What every result file says of its origin, and writing it, with a picture where there are bars to show."""

import datetime
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def origin() -> dict[str, Any]:
    """Date, commit (``+`` where the tree differs from it), machine and Python."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "machine": platform.machine(),
        "python": platform.python_version(),
    }


def write(result: dict[str, Any], folder: Path, name: str, console: Console) -> Path:
    """One dated JSON file in ``folder``; says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {path}", soft_wrap=True)
    return path


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


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or ("unknown" if arguments[0] == "rev-parse" else "")
