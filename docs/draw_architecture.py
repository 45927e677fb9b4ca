"""Draw docs/images/architecture.svg: the path of a training image through the packages.

python docs/draw_architecture.py
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

BOXES = {
    "storage": (0, 3, "data_pipeline/storage, index\nS3 shards, ranged reads"),
    "stream": (1, 3, "data_pipeline/stream\nelastic sampler, uint8 images"),
    "inputs": (2, 3, "training/inputs.py\ntime and noise per sample"),
    "encoders": (2, 4, "models/encoders.py\nfrozen text encoder, DINOv2"),
    "objective": (3, 3, "objectives\nflow matching, frequency, REPA"),
    "denoiser": (3, 2, "models/denoiser.py\nDiT blocks"),
    "decoder": (4, 2, "models/pixel_decoder.py\nrenders each patch"),
    "kernels": (4, 3, "kernels\nPyTorch, Triton"),
    "parallel": (2, 2, "parallel/parallelize.py, engines\nFSDP2 or DeepSpeed"),
    "precision": (1, 2, "precision\nfp32, bf16 or FP8"),
    "trainer": (1, 1, "training/trainer.py, train_step.py\naccumulate, check, update, EMA"),
    "checkpoint": (2, 1, "checkpoint\none canonical format"),
    "callbacks": (0, 1, "launcher/build/callbacks.py\nlogs, samples, evaluation, checks"),
    "sampling": (3, 1, "sampling\nguidance, samplers, images"),
    "tools": (4, 1, "checkpoints_tools\nformats and conversions"),
    "launcher": (1, 0, "launcher/train.py, build\nputs the packages together"),
    "evaluation": (4, 0, "evaluation, demo_app\nFID, GenEval, spectrum, demo"),
    "observability": (0, 2, "observability\nlog, metrics, wandb, report"),
    "cli": (3, 0, "deco_scale/cli\ndeco sample, evaluate, demo"),
    "watchdog": (2, 0, "watchdog\ndetects hung and lost ranks"),
    "config": (0, 0, "deco_scale/config.py, configs\nstrict YAML"),
}
ARROWS = [
    ("storage", "stream"), ("stream", "inputs"), ("encoders", "inputs"), ("inputs", "objective"),
    ("objective", "denoiser"), ("denoiser", "decoder"), ("kernels", "decoder"), ("parallel", "denoiser"),
    ("precision", "parallel"), ("trainer", "parallel"), ("trainer", "checkpoint"), ("trainer", "callbacks"),
    ("checkpoint", "sampling"), ("tools", "sampling"), ("launcher", "trainer"), ("config", "launcher"),
    ("cli", "sampling"), ("sampling", "evaluation"), ("callbacks", "observability"), ("launcher", "watchdog"),
]  # fmt: skip
WIDTH, HEIGHT, STEP_X, STEP_Y = 2.5, 0.62, 2.9, 1.05


def main() -> None:
    figure = Figure(figsize=(13.5, 5.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.1, 4 * STEP_X + WIDTH + 0.1), ylim=(-0.15, 4 * STEP_Y + HEIGHT + 0.15))
    axes.axis("off")
    for x, y, text in BOXES.values():
        corner = (x * STEP_X, y * STEP_Y)
        style = "round,pad=0.02,rounding_size=0.08"
        axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle=style, fc="#eef3fa", ec="#4a6fa5"))
        centre = (corner[0] + WIDTH / 2, corner[1] + HEIGHT / 2)
        axes.text(*centre, text, ha="center", va="center", fontsize=8.5)
    for source, target in ARROWS:
        (x1, y1, _), (x2, y2, _) = BOXES[source], BOXES[target]
        start = [x1 * STEP_X + WIDTH / 2, y1 * STEP_Y + HEIGHT / 2]
        end = [x2 * STEP_X + WIDTH / 2, y2 * STEP_Y + HEIGHT / 2]
        side = (x2 > x1) - (x2 < x1)
        rise = (y2 > y1) - (y2 < y1)
        if side:
            start[0] += side * WIDTH / 2
            end[0] -= side * WIDTH / 2
        else:
            start[1] += rise * HEIGHT / 2
            end[1] -= rise * HEIGHT / 2
        arrow = {"arrowstyle": "-|>", "color": "#4a6fa5", "shrinkA": 2, "shrinkB": 2}
        axes.annotate("", end, start, arrowprops=arrow)
    folder = Path(__file__).parent / "images"
    # No date and fixed ids: the same figure gives the same file.
    with matplotlib.rc_context({"svg.hashsalt": "architecture"}):
        figure.savefig(folder / "architecture.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
