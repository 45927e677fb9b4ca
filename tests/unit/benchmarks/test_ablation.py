"""The ablation's bookkeeping on a minute model: cells are repeatable, resumed, and compared seed by seed."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("skimage")
pytest.importorskip("sklearn")

from benchmarks.ablation import run as ablation
from benchmarks.ablation.cells import COMPARISONS, VARIANTS, build, prepare_images, run_cell

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    prepare_images(ablation.QUICK, folder)
    return folder


def test_a_cell_is_the_same_every_time_and_depends_on_its_seed(work: Path) -> None:
    cells = [run_cell(ablation.QUICK, "deco+freq", seed, work) for seed in (0, 0, 1)]
    for cell in cells:
        assert cell.pop("seconds") > 0
    assert cells[0] == cells[1]
    assert all(cells[0][name] != cells[2][name] for name in ("frechet", "heldout", "train_loss"))


@pytest.mark.slow
def test_finished_cells_are_not_trained_again(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (ablation.QUICK, ["baseline", "deco"], [0], work, QUIET)
    first = ablation.run_cells(*arguments, processes=1)
    assert [cell["variant"] for cell in first] == ["baseline", "deco"]
    monkeypatch.setattr(ablation, "prepare_images", lambda *_: pytest.fail("nothing is missing"))
    assert ablation.run_cells(*arguments, processes=1) == first
    # Other settings are other cells.
    longer = dataclasses.replace(ablation.QUICK, steps=5)
    assert not ablation.cell_path(work, longer, "deco", 0).exists()


def test_the_command_writes_table_figure_and_rows(work: Path, tmp_path: Path) -> None:
    image = tmp_path / "figure.png"
    arguments = ["--quick", "--seeds", "0", "--variants", "baseline", "deco", "--work", str(work)]
    assert ablation.main([*arguments, "--out", str(tmp_path), "--image", str(image)]) == 0
    (path,) = tmp_path.glob("ablation_*.json")
    result = json.loads(path.read_text())
    assert result["summary"].keys() == {"baseline", "deco"} and image.read_bytes().startswith(b"\x89PNG")
    header, *rows = path.with_suffix(".csv").read_text().splitlines()
    assert header.startswith("variant,seed,parameters,frechet,accuracy,heldout") and len(rows) == 2


def test_a_direction_shows_only_where_all_seeds_go_it() -> None:
    def verdict(*differences: float) -> str:
        cells = [{"variant": "deco", "seed": s, "frechet": 1.0 + d} for s, d in enumerate(differences)]
        cells += [{"variant": "baseline", "seed": s, "frechet": 1.0} for s in range(len(differences))]
        (row,) = ablation.compare(cells)
        return ablation.verdict(row)

    assert verdict(-0.5, -0.52, -0.48).startswith("yes (3 of 3 seeds, p ")
    assert verdict(0.5, 0.52, 0.48).startswith("no, the opposite (0 of 3")
    # All seeds agree, but by amounts that chance alone would give.
    assert verdict(-0.5, -0.001, -0.02).startswith("not decided (3 of 3")
    assert verdict(-0.5, 0.5, -0.5).startswith("not decided (2 of 3")
    assert verdict(-0.5) == "not decided (1 of 1 seeds)"


def test_variants_differ_in_what_their_names_say() -> None:
    """Width, depth and classes are equal; the comparison with one block more gives DeCo fewer parameters."""
    settings = ablation.Settings()
    models = {name: build(settings, variant, 0).denoiser for name, variant in VARIANTS.items()}
    assert {(m.cfg.dim, m.cfg.patch_size, m.cfg.num_classes) for m in models.values()} == {(64, 4, 10)}
    assert {n for n, m in models.items() if m.cfg.num_blocks != settings.num_blocks} == {"baseline+block"}
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()}
    assert count["baseline"] < count["deco"] < count["baseline+block"]
    assert {name for pair in COMPARISONS for name in pair[:2]} <= VARIANTS.keys()
