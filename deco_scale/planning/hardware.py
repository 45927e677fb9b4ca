"""What a GPU can do: datasheet numbers, what is reached of them, and where each figure comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from deco_scale.errors import ConfigError

Origin = Literal["measured", "assumed", "datasheet"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
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
    "a100": Gpu(
        bf16_flops=312e12, fp8_flops=None, fp32_flops=19.5e12, memory_bytes=80e9, copy_bytes_per_s=2.039e12,
        nvlink_bytes_per_s=300e9, network_gbps=200,
    ),
    "h100": Gpu(
        bf16_flops=989e12, fp8_flops=1979e12, fp32_flops=67e12, memory_bytes=80e9, copy_bytes_per_s=3.35e12,
        nvlink_bytes_per_s=450e9, network_gbps=400,
    ),
    "h200": Gpu(
        bf16_flops=989e12, fp8_flops=1979e12, fp32_flops=67e12, memory_bytes=141e9, copy_bytes_per_s=4.8e12,
        nvlink_bytes_per_s=450e9, network_gbps=400,
    ),
    "b200": Gpu(
        bf16_flops=2.25e15, fp8_flops=4.5e15, fp32_flops=80e12, memory_bytes=180e9, copy_bytes_per_s=8e12,
        nvlink_bytes_per_s=900e9, network_gbps=400,
    ),
}  # fmt: skip
GPUS_PER_NODE = 8
GEMM_SHARE, COPY_SHARE, FP8_SHARE, ATTENTION_SHARE, LINK_SHARE = 0.8, 0.88, 0.65, 0.4, 0.8
"""Assumed share of the datasheet where nothing is measured; attention's and FP8's also where a GEMM is."""
LAUNCH_S = {"cuda": 5e-6, "cpu": 8e-6}
"""Assumed host time of one operation of PyTorch, autograd's part included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """A rate, and whether it was measured, assumed or read."""

    what: str
    value: float
    unit: str
    origin: Origin
    source: str

    def __str__(self) -> str:
        return f"{self.what} {self.value:,.4g} {self.unit} ({self.origin}: {self.source})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Ceiling:
    """GEMM FLOP/s and copy bytes/s of one measurement, and its name."""

    gemm_flops: float
    copy_bytes_per_s: float
    source: str


ANCHORS = {"h100": Ceiling(gemm_flops=798e12, copy_bytes_per_s=3.0e12, source="8192^3 and copy")}
"""bf16 GEMM (8192 cubed) and copy (read plus written) that were measured on a GPU of this kind."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Rates that a prediction uses; ``peak_flops`` is what MFU is a share of, None where no datasheet has it.

    ``kind`` is the device type of PyTorch: a CPU computes and issues operations in turn, a GPU at once.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    gemm_flops: float
    fp8_flops: float | None
    attention_flops: float
    copy_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float
    memory_bytes: float | None
    peak_flops: float | None
    figures: tuple[Figure, ...]

    @property
    def launch_s(self) -> float:
        return LAUNCH_S[self.kind]


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
    sheet = GPUS[gpu]
    if compute == "fp8" and sheet.fp8_flops is None:
        raise ConfigError(f"precision.compute=fp8: {gpu} has no FP8; possible: bf16, fp32")
    peak = sheet.fp32_flops if compute == "fp32" else sheet.bf16_flops
    gemm, copy = _ceilings(gpu, peak, compute, measured)
    fp8, network = None, network_gbps or sheet.network_gbps
    figures = [gemm, copy, _assumed("attention", peak, ATTENTION_SHARE, 1e12, "TFLOP/s")]
    if sheet.fp8_flops and compute == "fp8":
        fp8 = sheet.fp8_flops * FP8_SHARE
        figures.append(_assumed("FP8 GEMM", sheet.fp8_flops, FP8_SHARE, 1e12, "TFLOP/s"))
    figures += [
        _assumed("NVLink, one direction", sheet.nvlink_bytes_per_s, LINK_SHARE, 1e9, "GB/s"),
        _assumed("network per GPU", network * 1e9 / 8, LINK_SHARE, 1e9, "GB/s"),
    ]
    return Device(
        name=gpu,
        kind="cuda",
        gemm_flops=gemm.value * 1e12,
        fp8_flops=fp8,
        attention_flops=peak * ATTENTION_SHARE,
        copy_bytes_per_s=copy.value * 1e9,
        nvlink_bytes_per_s=sheet.nvlink_bytes_per_s * LINK_SHARE,
        network_bytes_per_s=network * 1e9 / 8 * LINK_SHARE,
        memory_bytes=sheet.memory_bytes,
        peak_flops=sheet.bf16_flops,
        figures=tuple(figures),
    )


def measured_device(name: str, ceiling: Ceiling) -> Device:
    """A device that is in no table, a CPU: its own measured ceilings; processes talk through memory."""
    return Device(
        name=name,
        kind="cpu",
        gemm_flops=ceiling.gemm_flops,
        fp8_flops=None,
        attention_flops=ceiling.gemm_flops,
        copy_bytes_per_s=ceiling.copy_bytes_per_s,
        nvlink_bytes_per_s=ceiling.copy_bytes_per_s,
        network_bytes_per_s=ceiling.copy_bytes_per_s,
        memory_bytes=None,
        peak_flops=None,
        figures=(),
    )


def _assumed(what: str, peak: float, share: float, scale: float, unit: str) -> Figure:
    source = f"{share:.0%} of {peak / scale:,.4g}"
    return Figure(what=what, value=peak * share / scale, unit=unit, origin="assumed", source=source)


def _ceilings(gpu: str, peak: float, compute: str, measured: Sequence[Ceiling]) -> tuple[Figure, Figure]:
    if not measured and gpu in ANCHORS and compute != "fp32":
        measured = [ANCHORS[gpu]]
    if not measured:
        gemm = _assumed("GEMM", peak, GEMM_SHARE, 1e12, "TFLOP/s")
        return gemm, _assumed("copy", GPUS[gpu].copy_bytes_per_s, COPY_SHARE, 1e9, "GB/s")
    best, fastest = (max(measured, key=attrgetter(name)) for name in ("gemm_flops", "copy_bytes_per_s"))
    rates = best.gemm_flops / 1e12, fastest.copy_bytes_per_s / 1e9
    return (
        Figure(what="GEMM", value=rates[0], unit="TFLOP/s", origin="measured", source=best.source),
        Figure(what="copy", value=rates[1], unit="GB/s", origin="measured", source=fastest.source),
    )
