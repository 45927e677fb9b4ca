"""What `pip install` puts into site-packages: the four packages with their data files, and three commands."""

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.support import ROOT

PACKAGES = ("deco_scale", "data_pipeline", "checkpoints_tools", "launcher")
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built by setuptools from a copy of the tree, without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns("__pycache__", "results", "fixtures")
    for name in (*PACKAGES, "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_has_the_four_packages_with_all_modules_and_data_files(wheel: zipfile.ZipFile) -> None:
    installed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in installed} == set(PACKAGES)
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    assert installed == {str(p.relative_to(ROOT)) for p in files if "__pycache__" not in p.parts}
    assert any(name.endswith(".html.j2") for name in installed)


@pytest.mark.slow
def test_commands_of_the_wheel_print_their_help_in_another_folder(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    scripts = ConfigParser()
    scripts.read_string(wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode())
    assert set(scripts["console_scripts"]) == {"deco", "deco-data", "deco-ckpt"}
    started = {}
    for command, target in scripts["console_scripts"].items():
        module, _, function = target.partition(":")
        # As a console script does; the path of the module shows that it is the wheel's.
        code = f"import sys, {module} as m; print(m.__file__, flush=True); sys.argv[0] = {command!r}; m.main()"
        started[command] = subprocess.Popen(
            [sys.executable, "-c", code, "--help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    for command, process in started.items():
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 0, printed
        assert printed.startswith(str(tmp_path / "site")) and f"usage: {command}" in printed
