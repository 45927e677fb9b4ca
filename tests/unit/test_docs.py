"""What the documentation refers to exists: files, tests and make targets."""

import re
from pathlib import Path

import pytest

from tests.support import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
TOP = ("benchmarks", "checkpoints_tools", "configs", "data_pipeline", "deco_scale", "docs", "launcher", "tests")
FILES = re.compile(rf"(?<![\w/.])(?:{'|'.join(TOP)})/[\w./*-]*\w")
MODULES = re.compile(rf"\bpython -m ((?:{'|'.join(TOP)})(?:\.\w+)*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_modules_and_make_targets_of_the_documentation_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = {path for path in FILES.findall(text) if not any(ROOT.glob(path))}
    missing |= {
        module
        for module in MODULES.findall(text)
        if not any((ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in (".py", ""))
    }
    missing |= {
        f"make {name}" for name in re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.M) if name not in targets
    }
    assert not missing


def test_every_package_has_a_page_in_the_api_reference() -> None:
    documented = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        documented |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.MULTILINE))
    packages = {f"deco_scale.{path.parent.name}" for path in ROOT.glob("deco_scale/*/__init__.py")}
    assert packages | {"data_pipeline", "checkpoints_tools", "launcher"} <= documented
