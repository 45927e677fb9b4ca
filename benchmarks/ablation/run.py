"""DeCo against the baseline DiT at equal width, depth and steps, on small real images: what each part brings.

    python -m benchmarks.ablation [--quick] [--steps N] [--seeds 0 1 2] [--variants deco baseline ...]

The images are crops of ten photographs (scikit-image, scikit-learn) at 16 px; the class is the photograph. Each
variant is trained by the real objective and optimizer for the same number of steps on the same crops, noise and
times. Then, from EMA weights and without guidance as in the paper's comparison: the Frechet distance of samples to
other crops in the features of a small classifier trained here, the share of samples that it gives to the class
asked for, and the error of the velocity on crops never seen (the same quantity for all, whatever they predict).
REPA is left out: its encoder's weights are no part of this repository.

A cell is one variant under one seed. Each is written when done, and not trained again.
"""

import argparse
import csv
import dataclasses
import hashlib
import json
import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import record
from benchmarks.ablation.cells import (
    COMPARISONS,
    MEASURES,
    VARIANTS,
    Settings,
    prepare_images,
    run_cell,
)
from data_pipeline.storage.files import atomic_write

IMAGE = record.ROOT / "docs" / "images" / "ablation.png"
WORK = record.ROOT / "runs" / "ablation"
QUICK = Settings(
    side=16, patch_size=8, dim=32, num_heads=2, num_blocks=1, steps=4, batch=8, train_per_class=8,
    reference_per_class=8, heldout_per_class=2, samples_per_class=2, sampler_steps=2, classifier_steps=4,
)  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help=f"of training (default {Settings().steps})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="seconds instead of an hour; the numbers say nothing")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--work", type=Path, default=WORK, help="finished cells, crops and classifier")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder of the JSON and CSV")
    parser.add_argument("--image", "--picture", type=Path, default=IMAGE)
    args = parser.parse_args(argv)
    if (args.steps is not None and args.steps < 1) or args.processes < 1 or min(args.seeds) < 0:
        parser.error("--steps and --processes must be at least 1, --seeds not negative")
    return args


def cell_path(work: Path, settings: Settings, name: str, seed: int) -> Path:
    """Where a cell's result lies; other settings, variants or measures are other files."""
    identity = json.dumps([dataclasses.asdict(settings), dataclasses.asdict(VARIANTS[name]), MEASURES])
    return work / "cells" / f"{name}_{seed}_{hashlib.sha256(identity.encode()).hexdigest()[:12]}.json"


def run_cells(
    settings: Settings, names: Sequence[str], seeds: Sequence[int], work: Path, console: Console, *, processes: int
) -> list[dict[str, Any]]:
    """Results of all cells in order, those that are there already not trained again."""
    cells = [(name, seed, cell_path(work, settings, name, seed)) for seed in seeds for name in names]
    missing = [cell for cell in cells if not cell[2].exists()]
    if len(missing) < len(cells):
        console.print(f"{len(cells) - len(missing)} of {len(cells)} cells are there already")
    if missing:
        prepare_images(settings, work)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, len(missing)), mp_context=context) as pool:
            waiting = {
                pool.submit(run_cell, settings, name, seed, work): (name, seed, path)
                for name, seed, path in missing
            }
            for number, future in enumerate(as_completed(waiting), 1):
                name, seed, path = waiting[future]
                result = future.result()
                atomic_write(path, json.dumps(result, indent=1).encode(), durable=False)
                console.print(f"{number}/{len(missing)} {name}, seed {seed}: {result['seconds']:.0f} s")
    return [json.loads(path.read_text()) for _, _, path in cells]


def summarise(cells: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation (None for one seed) of each measure, by variant."""
    names = list(dict.fromkeys(cell["variant"] for cell in cells))
    summary: dict[str, dict[str, Any]] = {}
    for name in names:
        mine = [cell for cell in cells if cell["variant"] == name]
        summary[name] = {"parameters": mine[0]["parameters"], "seeds": len(mine)}
        for measure in MEASURES:
            values = [cell[measure] for cell in mine]
            deviation = statistics.stdev(values) if len(values) > 1 else None
            summary[name][measure] = {"mean": statistics.mean(values), "deviation": deviation}
    return summary


def compare(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of the paper's comparisons by Frechet distance, seed by seed; negative where ``better`` is."""
    found = {(cell["variant"], cell["seed"]): cell["frechet"] for cell in cells}
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    rows = []
    for better, worse, claim in COMPARISONS:
        pairs = [(better, seed) in found and (worse, seed) in found for seed in seeds]
        if not all(pairs):
            continue
        differences = [found[better, seed] - found[worse, seed] for seed in seeds]
        rows.append(
            {
                "better": better,
                "worse": worse,
                "claim": claim,
                "differences": differences,
                "mean": statistics.mean(differences),
                "seeds_that_agree": sum(d < 0 for d in differences),
                "p": paired_p(differences),
            }
        )
    return rows


def paired_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of a paired t-test over the seeds; None for fewer than two."""
    if len(differences) < 2:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def verdict(row: dict[str, Any]) -> str:
    """In words: a direction shows where all seeds go it and p is below 0.05."""
    agree, count, p = row["seeds_that_agree"], len(row["differences"]), row["p"]
    word = "not decided"
    if p is not None and p < 0.05 and agree in (0, count):
        word = "yes" if agree else "no, the opposite"
    return f"{word} ({agree} of {count} seeds" + (f", p {p:.2g})" if p is not None else ")")


def show(result: dict[str, Any], console: Console) -> None:
    """Both tables."""
    table = Table("variant", "parameters", *(f"{m} {unit}".strip() for m, unit in MEASURES.items()))
    for name, row in result["summary"].items():
        cells = [f"{row['parameters']:,}"]
        for measure in MEASURES:
            mean, deviation = row[measure]["mean"], row[measure]["deviation"]
            cells.append(f"{mean:.4g}" + (f" +- {deviation:.2g}" if deviation is not None else ""))
        table.add_row(name, *cells)
    console.print(table)
    console.print(f"real crops against the same reference: frechet {result['frechet_of_real_crops']:.4g}")
    table = Table("the paper has", "difference of frechet here, by seed", "does it show?")
    for row in result["comparisons"]:
        differences = ", ".join(f"{d:+.3g}" for d in row["differences"])
        table.add_row(f"{row['better']} below {row['worse']} ({row['claim']})", differences, verdict(row))
    console.print(table)


def write_csv(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """A row for each cell."""
    columns = ["variant", "seed", "parameters", *MEASURES, "train_loss", "seconds"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(cells)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each measure: a bar for a variant's mean, a dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["summary"])
    figure, panels = pyplot.subplots(1, len(MEASURES), figsize=(4.2 * len(MEASURES), 1.4 + 0.36 * len(names)))
    for panel, (measure, unit) in zip(panels, MEASURES.items(), strict=True):
        panel.barh(names, [result["summary"][name][measure]["mean"] for name in names], color="#9db8d9")
        panel.scatter(
            [cell[measure] for cell in result["cells"]],
            [cell["variant"] for cell in result["cells"]],
            color="black",
            s=10,
            zorder=3,
        )
        values = [cell[measure] for cell in result["cells"]]
        # Bars begin where the differences can be seen; the axis says where.
        room = 0.15 * (max(values) - min(values) or 1.0)
        panel.set_xlim(min(values) - room, max(values) + room)
        panel.set_title(f"{measure} {unit}".strip(), fontsize=10)
        panel.invert_yaxis()
    for panel in panels[1:]:
        panel.set_yticklabels([])
    settings = result["settings"]
    figure.suptitle(
        f"crops of ten photographs, {settings['side']} px, {settings['steps']} steps, a dot for each seed",
        fontsize=10,
    )
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args, console = parse(argv), Console()
    settings = QUICK if args.quick else Settings()
    if args.steps is not None:
        settings = dataclasses.replace(settings, steps=args.steps)
    cells = run_cells(settings, args.variants, args.seeds, args.work, console, processes=args.processes)
    result = {
        "kind": "ablation",
        **record.origin(),
        "settings": dataclasses.asdict(settings),
        "variants": {name: dataclasses.asdict(VARIANTS[name]) for name in args.variants},
        "frechet_of_real_crops": cells[0]["frechet_of_real_crops"],
        "classifier_accuracy": cells[0]["classifier_accuracy"],
        "summary": summarise(cells),
        "comparisons": compare(cells),
        "cells": cells,
    }
    show(result, console)
    path = record.write(result, args.out, "ablation", console)
    write_csv(cells, path.with_suffix(".csv"))
    draw(result, args.image)
    console.print(f"drawn to {args.image}", soft_wrap=True)
    return 0
