"""DCT spectra of a denoiser: of its DiT's tokens and of its predicted velocity.

Source: DeCo (arXiv 2511.19365), figure 4, section 3.4 and algorithm 3 (appendix E.3): 8 x 8 DCT blocks of the
DiT's output, as a grid of tokens with D channels, and of the predicted velocity; squared coefficients in zig-zag
order, averaged over blocks, images and all steps of sampling; curves are log(1 + energy) over their maximum.

What the paper leaves open: the DCT is orthonormal, so the 64 mean energies average to the mean square; blocks do
not overlap, and rows and columns after the last full block are dropped; all channels have equal weight, those of
the velocity being R, G, B; the DiT's output is the tokens after the last DiT block, for every kind of model,
before what turns them into pixels (activation and decoder, or the baseline's final layer); no guidance.

Shape letters: B batch, N tokens, D model width, M images, C channels, Y X rows and columns, T times, K the 64
frequencies in zig-zag order.
"""

import csv
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deco_scale.models import Denoiser
from deco_scale.objectives.flow_matching import noised
from deco_scale.objectives.frequency import BLOCK, block_dct
from deco_scale.sampling import SamplerConfig, VelocityFn, sample

FREQUENCIES = BLOCK * BLOCK
SIGNALS = {"dit_output": "DiT output", "velocity": "pixel velocity"}
"""Signals that are transformed: their names in tables, and in figures."""


def zigzag() -> list[tuple[int, int]]:
    """(Row, column) of the 64 frequencies of a block from low to high, in the order of ITU-T T.81, figure A.6."""

    def order(frequency: tuple[int, int]) -> tuple[int, int]:
        diagonal = sum(frequency)
        # Odd diagonals are walked downwards, even ones upwards.
        return diagonal, frequency[0] if diagonal % 2 else frequency[1]

    return sorted(((u, v) for u in range(BLOCK) for v in range(BLOCK)), key=order)


def block_energies(image_MCYX: Tensor) -> Tensor:
    """Mean squared DCT coefficient of each frequency, ``(64,)`` in float64 and zig-zag order.

    Raises ``ValueError`` for images smaller than a block.
    """
    rows, cols = (side // BLOCK * BLOCK for side in image_MCYX.shape[-2:])
    if not rows or not cols:
        raise ValueError(f"no full {BLOCK} x {BLOCK} block in {image_MCYX.shape[-2]} x {image_MCYX.shape[-1]}")
    coefficients = block_dct(image_MCYX[..., :rows, :cols].float())
    energy = coefficients.square().double().mean(dim=(0, 1, 2, 3)).flatten().cpu()
    return energy[torch.tensor([u * BLOCK + v for u, v in zigzag()])]


def normalised(energy_K: Tensor) -> Tensor:
    """log(1 + energy) divided by its maximum over the last axis; zeros if there is no energy."""
    logarithm = energy_K.log1p()
    return logarithm / logarithm.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(energy_K.dtype).tiny)


class Spectrum(NamedTuple):
    """Mean energies of one model: times ``(T,)`` and, by the name of the signal, energies ``(T, 64)``."""

    times: list[float]
    energies: dict[str, Tensor]
    num_images: int

    def overall(self, signal: str) -> Tensor:
        """Mean over the times, ``(64,)``; each time has the same images."""
        return self.energies[signal].mean(dim=0)


class SpectrumProbe:
    """A velocity that records the spectra of each call.

    It may only be called at ``times``. ``velocity`` must call ``denoiser`` once.
    """

    def __init__(self, denoiser: Denoiser, velocity: VelocityFn, *, times: Tensor) -> None:
        self._velocity, self._times = velocity, times.float().cpu()
        self._last_block, self._patch_size = denoiser.blocks[-1], denoiser.cfg.patch_size
        self._index = {float(t): i for i, t in enumerate(self._times)}
        self._sums = {name: torch.zeros(len(self._times), FREQUENCIES, dtype=torch.float64) for name in SIGNALS}
        self._counts = torch.zeros(len(self._times), dtype=torch.int64)

    def __call__(self, x: Tensor, t_B: Tensor, condition: Tensor) -> Tensor:
        """Velocity ``(B, C, Y, X)`` at one time for the whole batch."""
        step = self._index[float(t_B[0])]
        outputs: list[Tensor] = []
        with self._last_block.register_forward_hook(lambda block, inputs, output: outputs.append(output)):
            velocity = self._velocity(x, t_B, condition)
        (tokens_BND,) = outputs
        rows, cols = x.shape[-2] // self._patch_size, x.shape[-1] // self._patch_size
        tokens_BDYX = tokens_BND.unflatten(1, (rows, cols)).permute(0, 3, 1, 2)
        for name, values in zip(SIGNALS, (tokens_BDYX, velocity), strict=True):
            self._sums[name][step] += block_energies(values) * len(x)
        self._counts[step] += len(x)
        return velocity

    def spectrum(self) -> Spectrum:
        """The spectrum so far; raises ``ValueError`` if the times have different numbers of images."""
        low, high = int(self._counts.min()), int(self._counts.max())
        if low != high or not low:
            raise ValueError(f"between {low} and {high} images at the {len(self._times)} times")
        means = {name: sums / low for name, sums in self._sums.items()}
        return Spectrum([float(t) for t in self._times], means, low)


@torch.no_grad()
def probe_samples(
    probe: SpectrumProbe, noise: Tensor, condition: Tensor, null: Tensor, *, sampler: SamplerConfig
) -> None:
    """Sample without guidance and record the spectra of every step; ``probe`` has the times of ``sampler``.

    Raises ``ValueError`` for a sampler with guidance or other than Euler, which calls the model once per step.
    """
    if sampler.guidance != 1.0 or sampler.solver != "euler":
        raise ValueError(f"spectra need Euler steps without guidance, not {sampler}")
    sample(probe, noise, condition, null.expand_as(condition), sampler)


@torch.no_grad()
def probe_images(probe: SpectrumProbe, image: Tensor, noise: Tensor, condition: Tensor, *, times: Tensor) -> None:
    """Record the spectra of images ``(B, C, Y, X)`` in [-1, 1], noised to each of ``times``."""
    for t in times.to(image.device):
        t_B = t.expand(len(image))
        probe(noised(image, noise, t_B), t_B, condition)


def write_csv(path: Path, spectra: Mapping[str, Spectrum]) -> None:
    """A row per label, signal, time and frequency, and rows with an empty time for the mean over the times.

    Columns: label, signal, time, index (zig-zag, from 0), row and column of the frequency in its block, energy
    (mean squared coefficient), normalised (0 to 1, as in the paper's figure).
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["label", "signal", "time", "index", "row", "column", "energy", "normalised"])
        for label, spectrum in spectra.items():
            for signal in SIGNALS:
                curves: list[tuple[str, Tensor]] = [("", spectrum.overall(signal))]
                curves += [
                    (f"{t:.6g}", energy)
                    for t, energy in zip(spectrum.times, spectrum.energies[signal], strict=True)
                ]
                for time, energy_K in curves:
                    shown = normalised(energy_K)
                    for k, (u, v) in enumerate(zigzag()):
                        cells = [f"{float(energy_K[k]):.8g}", f"{float(shown[k]):.8g}"]
                        table.writerow([label, signal, time, k, u, v, *cells])


def draw(path: Path, spectra: Mapping[str, Spectrum]) -> None:
    """A PNG: the paper's figure (means over the times), then for each label and signal a map over the times."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2 + 2.6 * len(spectra)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1 + len(spectra), 2, height_ratios=[1.6] + [1.0] * len(spectra))
    curves = figure.add_subplot(grid[0, :])
    for i, (label, spectrum) in enumerate(spectra.items()):
        for signal, style in zip(SIGNALS, ("-", "--"), strict=True):
            shown = normalised(spectrum.overall(signal)).numpy()
            curves.plot(range(FREQUENCIES), shown, style, color=f"C{i}", label=f"{SIGNALS[signal]} ({label})")
        for column, signal in enumerate(SIGNALS):
            axes = figure.add_subplot(grid[1 + i, column])
            energy_TK = normalised(spectrum.energies[signal]).numpy()
            # Rows end at the midpoints of neighbouring times, the first and the last at 0 and 1.
            edges = [0.0, *((a + b) / 2 for a, b in pairwise(spectrum.times)), 1.0]
            mesh = axes.pcolormesh(range(FREQUENCIES + 1), edges, energy_TK, vmin=0, vmax=1, cmap="viridis")
            axes.set(title=f"{SIGNALS[signal]} ({label})", xlabel="frequency, zig-zag order", ylabel="time t")
            figure.colorbar(mesh, ax=axes)
    curves.set(
        xlabel="frequency, zig-zag order (low to high)",
        ylabel="normalised log energy",
        title=f"8 x 8 DCT energy, mean over {len(next(iter(spectra.values())).times)} times",
        ylim=(0, 1.03),
    )
    curves.grid(alpha=0.3)
    curves.legend()
    figure.savefig(path, dpi=130)
