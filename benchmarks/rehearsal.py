"""Tests the GPU machine's versions on a CPU, to find incompatibilities before the first GPU run.

    make rehearsal      makes the environment of constraints-gpu.txt, then runs this module in it

Imports of every module, compilation of every Triton kernel for sm_90, the pass on tensors of a GPU that is not
there, both calls of the GPU suite in their CPU form (without git, and without boto3), unit and parity tests, and
megatron-core's layers. Nothing here shows what a GPU computes, or how fast. The summary goes to
``benchmarks/results/rehearsal.json``, logs to DIR. Exit code 1 where a job failed.
"""

import argparse
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from benchmarks import record
from benchmarks.jobs.runner import (
    CheckFailed,
    Found,
    Job,
    Outcome,
    Where,
    failed,
    pytest_job,
    run_jobs,
    write_json,
)

BUDGET_S = 3600.0
"""So that a busy machine does not fail it; alone on 2 cores it takes less than 20 minutes."""
CONSTRAINTS = record.ROOT / "constraints-gpu.txt"
PYTHON = "3.12"
"""Of the GPU machine."""
PACKAGES = ("deco_scale", "data_pipeline", "checkpoints_tools", "launcher", "benchmarks")
OPTIONAL = ("transformer-engine",)
"""Comes as carried wheels or not at all."""


def expected_versions() -> dict[str, str]:
    """Package and version by ``constraints-gpu.txt``."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return dict(line.split("==", 1) for line in lines if line)  # type: ignore[misc]


def versions(where: Where) -> Found:
    """What is installed is what the GPU machine has."""
    expected, actual = expected_versions(), installed_versions()
    wrong = [f"{n} {actual.get(n, 'missing')} in place of {v}" for n, v in expected.items() if actual.get(n) != v]
    if platform.python_version_tuple()[:2] != tuple(PYTHON.split(".")):
        wrong.insert(0, f"Python {platform.python_version()} in place of {PYTHON}")
    if wrong:
        raise CheckFailed("; ".join(wrong))
    missing = [name for name in OPTIONAL if name not in actual]
    without = f"; without {', '.join(missing)}, whose wheels do not lie here" if missing else ""
    return Found(f"{len(expected)} versions as on the GPU machine{without}", actual)


def installed_versions() -> dict[str, str]:
    """Installed packages of the list, build tags of PyTorch left out."""
    found = {}
    for name in (*expected_versions(), *OPTIONAL):
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def modules() -> Iterator[str]:
    """Every module of the project."""
    for package in PACKAGES:
        yield package
        folder = record.ROOT / package.replace(".", "/")
        yield from (m.name for m in pkgutil.walk_packages([str(folder)], f"{package}.", onerror=_raise))


def _raise(name: str) -> None:
    raise CheckFailed(f"{name} cannot be imported: {sys.exc_info()[1]}")


def imports(where: Where) -> Found:
    """Every module of the project can be imported here."""
    wrong, without, names = [], [], sorted(set(modules()))
    missing = {name.replace("-", "_") for name in set(OPTIONAL) - set(installed_versions())}
    for name in names:
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            # Whatever an import raises, it would raise on the GPU machine.
            if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in missing:
                without.append(name)
            else:
                wrong.append(f"{name}: {type(error).__name__}: {error}")
    if wrong:
        raise CheckFailed("; ".join(wrong))
    left_out = f"; not {', '.join(without)}, without {', '.join(sorted(missing))}" if without else ""
    return Found(f"{len(names) - len(without)} modules{left_out}")


def jobs(out: Path) -> list[Job]:
    """All jobs in order, what fails soonest first."""
    bare = {"DECO_COMMIT": record.commit(), **without_git_and_boto3(out)}
    alone = {
        "kernels_sm90": ("tests/unit/kernels/test_compile_sm90.py",),
        "fake_cuda": ("tests/unit/fake_cuda/test_step.py", "tests/unit/fake_cuda/test_sampling.py"),
    }
    suite = [
        Job(
            f"suite_{call}",
            900,
            command=("-m", "benchmarks.gpu_suite", "--out", str(out / call), f"--{call}", "--device", "cpu"),
            environment=bare,
        )
        for call in ("first", "second")
    ]
    selected = ("-m", "not gpu and not long")
    others = [f"--ignore={path}" for paths in alone.values() for path in paths]
    return [
        Job("versions", 60, function="benchmarks.rehearsal:versions"),
        Job("imports", 300, function="benchmarks.rehearsal:imports"),
        *(pytest_job(name, 900, *paths, *selected) for name, paths in alone.items()),
        *suite,
        pytest_job("megatron", 1200, "tests/distributed/test_tensor_parallel.py", *selected),
        pytest_job(
            "unit_and_parity",
            2400,
            "tests/unit",
            "tests/parity",
            *others,
            *selected,
            "-n",
            "2",
            "--dist",
            "loadfile",
        ),
    ]


def without_git_and_boto3(out: Path) -> dict[str, str]:
    """Environment in which neither is there: a PATH without git, and modules that fail as missing ones do."""
    absent, path = out / "absent", []
    for folder in map(Path, os.environ["PATH"].split(os.pathsep)):
        if (folder / "git").exists():
            # Everything else of that folder stays.
            mirror = out / "path" / "_".join(folder.parts[1:])
            shutil.rmtree(mirror, ignore_errors=True)
            mirror.mkdir(parents=True)
            for program in folder.iterdir():
                if program.name != "git":
                    (mirror / program.name).symlink_to(program)
            folder = mirror
        path.append(str(folder))
    absent.mkdir(parents=True, exist_ok=True)
    for name in ("boto3", "botocore"):
        error = f"raise ModuleNotFoundError({f'No module named {name}'!r}, name={name!r})\n"
        (absent / f"{name}.py").write_text(error)
    return {"PATH": os.pathsep.join(path), "PYTHONPATH": os.pathsep.join([str(absent), str(record.ROOT)])}


def summary(outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """What is committed of a run: outcomes without paths or times of this machine's logs."""
    kept = ("status", "line", "seconds")
    checks = {name: {key: outcome[key] for key in kept} for name, outcome in outcomes.items()}
    for check in checks.values():
        check["seconds"] = round(check["seconds"])
        check["line"] = re.sub(r" in [\d.]+s( \([\d:]+\))?|; results in .*", "", str(check["line"]))
    return {
        **record.origin(),
        "kind": "rehearsal",
        "versions": installed_versions(),
        "seconds": sum(check["seconds"] for check in checks.values()),
        "checks": checks,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=record.ROOT / "runs" / "rehearsal", help="folder for logs")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of the jobs; the summary is left alone")
    args = parser.parse_args(argv)
    out, console = args.out.resolve(), Console(width=None if sys.stdout.isatty() else 160)
    every = jobs(out)
    unknown = set(args.only or ()) - {job.name for job in every}
    if unknown:
        parser.error(f"no job {sorted(unknown)}; possible: {[job.name for job in every]}")
    chosen = [job for job in every if not args.only or job.name in args.only]
    outcomes = run_jobs(chosen, out, BUDGET_S, console, file="rehearsal.json")
    if not args.only:
        path = record.RESULTS / "rehearsal.json"
        write_json(path, summary(outcomes))
        console.print(f"written to {path.relative_to(record.ROOT)}")
    return 1 if failed(outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
