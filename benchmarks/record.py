"""What every result file says of its origin, and writing it."""

import datetime
import json
import platform
import subprocess
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


def write(result: dict[str, Any], folder: Path, name: str, console: Console) -> None:
    """One dated JSON file in ``folder``; says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{result['date']}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    console.print(f"written to {path}", soft_wrap=True)


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or ("unknown" if arguments[0] == "rev-parse" else "")
