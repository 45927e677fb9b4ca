"""What a GPU can do: datasheet numbers, what is reached of them, and where each figure comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

from deco_scale.errors import ConfigError


class Gpu(NamedTuple):
    """Datasheet of one GPU: dense FLOP/s, bytes, bytes/s; ``nvlink`` in one direction, ``network`` its share."""

    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_bytes: float
    copy_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_gbps: float


# NVIDIA's datasheets of the SXM boards (A100 80GB, H100, H200; DGX/HGX B200 for B200): tensor-core rates without
# sparsity, fp32 without TF32, half of NVLink's total for one direction. Network: the adapters of DGX A100 (8 x
# 200 Gbit/s), DGX H100, H200 and B200 (8 x 400 Gbit/s), one for each GPU.
GPUS = {
    #             bf16      fp8     fp32   memory      copy  NVLink  network
    "a100": Gpu(312e12,    None, 19.5e12,   80e9, 2.039e12,  300e9,  200),
    "h100": Gpu(989e12, 1979e12,   67e12,   80e9,  3.35e12,  450e9,  400),
    "h200": Gpu(989e12, 1979e12,   67e12,  141e9,   4.8e12,  450e9,  400),
    "b200": Gpu(2.25e15, 4.5e15,   80e12,  180e9,     8e12,  900e9,  400),
}  # fmt: skip
GPUS_PER_NODE = 8
MARGIN = 0.08
"""Share of a GPU's memory that a plan leaves free, for fragmentation and what is not counted."""
GEMM_SHARE, COPY_SHARE, FP8_SHARE, ATTENTION_SHARE, LINK_SHARE = 0.8, 0.88, 0.65, 0.4, 0.8
"""Assumed share of the datasheet where nothing is measured; attention's and FP8's also where a GEMM is."""
LAUNCH_S = {"cuda": 5e-6, "cpu": 8e-6}
"""Assumed host time of one operation of PyTorch, autograd's part included."""


class Ceiling(NamedTuple):
    """GEMM FLOP/s and copy bytes/s of one measurement, and its name."""

    gemm_flops: float
    copy_bytes_per_s: float
    source: str


ANCHORS = {"h100": Ceiling(gemm_flops=798e12, copy_bytes_per_s=3.0e12, source="8192^3 and copy")}
"""bf16 GEMM (8192 cubed) and copy (read plus written) that were measured on a GPU of this kind."""


_UNITS = {"TFLOP/s": 1e12, "GB/s": 1e9}


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Rates that a prediction uses.

    ``kind`` is the device type of PyTorch: a CPU computes and issues operations in turn, a GPU at once.
    ``figures`` names each rate, and whether it was measured or assumed.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    gemm_flops: float
    fp8_flops: float | None = None
    attention_flops: float
    copy_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    memory_bytes: float | None = None
    figures: tuple[str, ...] = ()

    def fits(self, memory_bytes: float) -> bool:
        """Whether the margin stays free; a device of unknown memory takes anything."""
        return self.memory_bytes is None or memory_bytes <= self.memory_bytes * (1 - MARGIN)


def gpu_named(device_name: str) -> str | None:
    """Key of the table for a name such as ``NVIDIA H100 80GB HBM3``, or None."""
    return next((key for key in GPUS if key in device_name.lower()), None)


def gpu_device(
    gpu: str, *, compute: str, network_gbps: float | None = None, measured: Sequence[Ceiling] = ()
) -> Device:
    """Rates of a GPU of the table for ``compute`` (fp32, bf16, fp8).

    The best of ``measured`` (ceilings of this GPU in this number format) replaces what is assumed. Raises
    :class:`ConfigError` for an unknown GPU, a format that it lacks, or a network without bandwidth.
    """
    if gpu not in GPUS:
        raise ConfigError(f"--gpu {gpu}: unknown; possible: {', '.join(sorted(GPUS))}")
    if network_gbps is not None and not network_gbps > 0:
        raise ConfigError(f"--network-gbps {network_gbps} must be positive")
    sheet, figures = GPUS[gpu], []
    if compute == "fp8" and sheet.fp8_flops is None:
        raise ConfigError(f"precision.compute=fp8: {gpu} has no FP8; possible: bf16, fp32")

    def figure(what: str, rate: float, unit: str, origin: str) -> float:
        figures.append(f"{what} {rate / _UNITS[unit]:,.4g} {unit} ({origin})")
        return rate

    def assumed(what: str, peak: float, share: float, unit: str = "GB/s") -> float:
        return figure(what, peak * share, unit, f"assumed: {share:.0%} of {peak / _UNITS[unit]:,.4g}")

    peak = sheet.fp32_flops if compute == "fp32" else sheet.bf16_flops
    if not measured and gpu in ANCHORS and compute != "fp32":
        measured = [ANCHORS[gpu]]
    if measured:
        best, fastest = (max(measured, key=attrgetter(name)) for name in ("gemm_flops", "copy_bytes_per_s"))
        gemm = figure("GEMM", best.gemm_flops, "TFLOP/s", f"measured: {best.source}")
        copy = figure("copy", fastest.copy_bytes_per_s, "GB/s", f"measured: {fastest.source}")
    else:
        gemm = assumed("GEMM", peak, GEMM_SHARE, "TFLOP/s")
        copy = assumed("copy", sheet.copy_bytes_per_s, COPY_SHARE)
    return Device(
        name=gpu,
        kind="cuda",
        gemm_flops=gemm,
        attention_flops=assumed("attention", peak, ATTENTION_SHARE, "TFLOP/s"),
        fp8_flops=assumed("FP8 GEMM", sheet.fp8_flops or 0.0, FP8_SHARE, "TFLOP/s") if compute == "fp8" else None,
        copy_bytes_per_s=copy,
        nvlink_bytes_per_s=assumed("NVLink, one direction", sheet.nvlink_bytes_per_s, LINK_SHARE),
        network_bytes_per_s=assumed("network per GPU", (network_gbps or sheet.network_gbps) * 1e9 / 8, LINK_SHARE),
        memory_bytes=sheet.memory_bytes,
        figures=tuple(figures),
    )


def cpu_device(name: str, ceiling: Ceiling) -> Device:
    """A device that is in no table, a CPU: its own measured ceilings; processes talk through memory."""
    gemm, copy, _ = ceiling
    return Device(
        name=name,
        kind="cpu",
        gemm_flops=gemm,
        attention_flops=gemm,
        copy_bytes_per_s=copy,
        nvlink_bytes_per_s=copy,
        network_bytes_per_s=copy,
    )
