"""Speed of the two ways to decode, and how near the fast one is to the release's preprocessing.

    python -m benchmarks.data.decode_quality

Ten photographs (scikit-image, scikit-learn) enlarged to 1024x768, 1536x1024 and 1279x1063 (whose sides do
not halve evenly: the release's BOX then shifts pixels, see tests), JPEG quality 90. Seconds are
CPU time of one thread, hence per core also on a busy machine; the two ways take turns within a round, so that
the ratio is of neighbours in time. Prints medians over the rounds, and PSNR over the ten images.
"""

import argparse
import io
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps, features
from rich.console import Console
from rich.table import Table

from benchmarks import record
from data_pipeline.decode import DecodeMode, Pixels, decode
from launcher.demo.dataset import SUBJECTS, photograph

SOURCES = ((1024, 768), (1536, 1024), (1279, 1063))
"""(Width, height) of the encoded images."""
RESOLUTIONS = (256, 512)
QUALITY = 90
MODES: tuple[DecodeMode, ...] = ("exact", "fast")
MAX_PIXELS = 10**8


def encoded_photographs(size: tuple[int, int]) -> list[bytes]:
    """The photographs as JPEG files of one (width, height)."""
    files = []
    for subject in SUBJECTS:
        buffer = io.BytesIO()
        ImageOps.fit(photograph(subject), size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY)
        files.append(buffer.getvalue())
    return files


def psnr_db(one: Pixels, other: Pixels) -> float:
    """Peak signal-to-noise ratio of two images of equal shape."""
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return float(10 * np.log10(255**2 / max(error, 1e-10)))


def measure(source: tuple[int, int], resolution: int, rounds: int) -> dict[str, Any]:
    """Images/s per core of both ways, their ratio, and PSNR between them."""
    files, size = encoded_photographs(source), (resolution, resolution)
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    images: dict[str, list[Pixels]] = {}
    # The first round warms up and gives the images to compare.
    for turn in range(rounds + 1):
        for mode in MODES:
            began = time.thread_time()
            images[mode] = [decode(file, size, mode=mode, max_pixels=MAX_PIXELS) for file in files]
            if turn:
                seconds[mode].append(time.thread_time() - began)
    quality = [psnr_db(*pair) for pair in zip(images["exact"], images["fast"], strict=True)]
    return {
        "source": f"{source[0]}x{source[1]}",
        "resolution": resolution,
        "mean_kb": round(statistics.mean(map(len, files)) / 1000, 1),
        "exact_images_per_s": round(len(files) / statistics.median(seconds["exact"]), 1),
        "fast_images_per_s": round(len(files) / statistics.median(seconds["fast"]), 1),
        "ratio": round(statistics.median(a / b for a, b in zip(*seconds.values(), strict=True)), 2),
        "psnr_min_db": round(min(quality), 1),
        "psnr_mean_db": round(statistics.mean(quality), 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    rows = [measure(source, resolution, args.rounds) for source in SOURCES for resolution in RESOLUTIONS]
    table = Table(title=f"{len(SUBJECTS)} JPEG q{QUALITY}, images/s per core, PSNR")
    for heading in ("source", "to", "kB", "exact", "fast", "ratio", "min dB", "mean dB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if args.json:
        versions = {"pillow": PIL.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
        about = {**record.origin(), **versions, "rounds": args.rounds}
        record.write_json(args.json, {"about": about, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
