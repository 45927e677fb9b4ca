"""What the documentation refers to exists: files, modules, names, settings, tests and make targets."""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path

import pytest

from deco_scale.config import RunConfig
from tests.support import ROOT

PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")} - {ROOT / "CHANGELOG.md"})  # it names what is gone
TOP = ("benchmarks", "checkpoints_tools", "configs", "data_pipeline", "deco_scale", "docs", "launcher", "tests")
FILES = re.compile(rf"(?<![\w/.])(?:{'|'.join(TOP)})/[\w./*-]*\w")
MODULES = re.compile(rf"\bpython -m ((?:{'|'.join(TOP)})(?:\.\w+)*)")
SOURCES = {path: path.read_text(encoding="utf-8") for top in TOP for path in ROOT.glob(f"{top}/**/*.py")}
CODE = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"(?<![\w./-])[A-Za-z_]\w*(?:[./]\w+)+")
"""``package.module.Name``, ``Class.method``, ``section.key`` and ``folder/file.py`` in a piece of code."""
SECTIONS = {field.name for field in dataclasses.fields(RunConfig)}
FILE_TYPES = {"ckpt", "csv", "j2", "json", "jsonl", "md", "npz", "png", "safetensors", "txt", "yaml"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_modules_and_make_targets_of_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = {path for path in FILES.findall(text) if not any(ROOT.glob(path))}
    missing |= {module for module in MODULES.findall(text) if not _runs(ROOT / module.replace(".", "/"))}
    missing |= {
        f"make {name}" for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M) if name not in targets
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_in_code_of_the_documentation_exist(page: Path) -> None:
    names = {n for code in CODE.findall(page.read_text(encoding="utf-8")) for n in DOTTED.findall(code)}
    assert not {name for name in names if not _exists(name)}


def _runs(module: Path) -> bool:
    return module.with_suffix(".py").exists() or (module / "__main__.py").exists()


def _exists(name: str) -> bool:
    first, last = re.split(r"[./]", name)[0], re.split(r"[./]", name)[-1]
    if name.endswith(".py"):
        return any(f"/{path.relative_to(ROOT)}".endswith(f"/{name}") for path in SOURCES)
    if "/" in name or last in FILE_TYPES:
        return True
    if first in TOP:
        path = ROOT / name.replace(".", "/")
        module = path.parent.with_suffix(".py")
        return path.is_dir() or path.with_suffix(".py").exists() or last in SOURCES.get(module, "")
    if first in SECTIONS:
        # Counters of the data pipeline have names like those of settings.
        return _is_setting(name) or any(f'"{last}' in source for source in SOURCES.values())
    if first[0].isupper():
        return any(f"class {first}" in source and f"def {last}(" in source for source in SOURCES.values())
    return True


def _is_setting(name: str) -> bool:
    current: typing.Any = RunConfig
    for part in name.split("."):
        kinds = [current, *typing.get_args(current)]
        settings = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        hints = typing.get_type_hints(settings) if settings is not None else {}
        if part not in hints:
            return False
        current = hints[part]
    return True


def test_every_package_has_a_page_in_the_api_reference() -> None:
    documented = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        documented |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    packages = {f"deco_scale.{path.parent.name}" for path in ROOT.glob("deco_scale/*/__init__.py")}
    assert packages | {"data_pipeline", "checkpoints_tools", "launcher"} <= documented


def test_the_architecture_page_lists_the_import_layers_of_the_contract() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contract = next(c for c in project["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    layers = "\n".join(f"    {layer.replace(' : ', ', ')}" for layer in contract["layers"])
    assert f"\n{layers}\n" in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
