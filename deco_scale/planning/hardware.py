"""What a GPU can do: datasheet numbers, what is reached of them, and where each figure comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal, NamedTuple

from deco_scale.errors import ConfigError
from deco_scale.planning.host import HOST_TIMES, HostTimes

Link = Literal["NVLink", "PCIe"]
"""How the GPUs of a node reach each other; AMD's Infinity Fabric is counted as NVLink is."""


class Gpu(NamedTuple):
    """Datasheet of one GPU: dense FLOP/s (accumulated in fp32), bytes, bytes/s.

    ``link_bytes_per_s`` is one direction of the ``link`` inside a node, ``network`` the adapter of one GPU,
    ``sms`` the multiprocessors (AMD: compute units) over which a matrix product's tiles are spread.
    """

    bf16_flops: float
    fp8_flops: float | None
    fp32_flops: float
    memory_bytes: float
    copy_bytes_per_s: float
    link_bytes_per_s: float
    network_gbps: float
    sms: int
    link: Link = "NVLink"


# Datasheets of NVIDIA's SXM boards (A100 40GB and 80GB, A800, H100, H800, H200, H20; DGX/HGX B200 for B200) and
# the L40S, "NVIDIA Ada GPU architecture" (GeForce RTX 4090) and "AMD Instinct MI300X": tensor-core rates without
# sparsity, fp32 without TF32, half of a link's total for one direction. A800 and H800 differ from A100 and H100 by
# their NVLink, H20 by its multiprocessors as well. Network: the adapters of DGX A100 (8 x 200 Gbit/s), DGX H100,
# H200 and B200 (8 x 400 Gbit/s) and the MI300X platform, one for each GPU. Servers with L40S or 4090 have no such
# standard: 100 Gbit/s a GPU is assumed, ``--network-gbps`` states another.
GPUS = {
    #                  bf16       fp8      fp32  memory      copy    link network  SMs
    "a100":    Gpu(  312e12,     None,  19.5e12,   80e9, 2.039e12,  300e9,  200,  108),
    "a100-40": Gpu(  312e12,     None,  19.5e12,   40e9, 1.555e12,  300e9,  200,  108),
    "a800":    Gpu(  312e12,     None,  19.5e12,   80e9, 2.039e12,  200e9,  200,  108),
    "h100":    Gpu(  989e12,  1979e12,    67e12,   80e9,  3.35e12,  450e9,  400,  132),
    "h800":    Gpu(  989e12,  1979e12,    67e12,   80e9,  3.35e12,  200e9,  400,  132),
    "h200":    Gpu(  989e12,  1979e12,    67e12,  141e9,   4.8e12,  450e9,  400,  132),
    "h20":     Gpu(  148e12,   296e12,    44e12,   96e9,     4e12,  450e9,  400,   78),
    "b200":    Gpu( 2.25e15,   4.5e15,    80e12,  180e9,     8e12,  900e9,  400,  148),
    "l40s":    Gpu(  362e12,   733e12,  91.6e12,   48e9,  0.864e12,  32e9,  100,  142, "PCIe"),
    "4090":    Gpu(165.2e12, 330.3e12,  82.6e12,   24e9,  1.008e12,  32e9,  100,  128, "PCIe"),
    "mi300x":  Gpu(1307e12,   2615e12, 163.4e12,  192e9,    5.3e12, 448e9,  400,  304),
}  # fmt: skip
GPUS_PER_NODE = 8
MARGIN = 0.08
"""Share of a GPU's memory that a plan leaves free, for fragmentation and what is not counted."""
GEMM_SHARE, COPY_SHARE, FP8_SHARE, ATTENTION_SHARE, LINK_SHARE = 0.8, 0.88, 0.65, 0.55, 0.8
"""Assumed share of the datasheet where nothing is measured; attention's (with long keys) and FP8's also where a
GEMM is."""
ENCODER_SHARE = {False: 0.36, True: 0.5}
"""Assumed share of the datasheet's bf16 rate that frozen encoders reach: eager modules, and compiled ones."""


CPU_LAUNCH_S = 8e-6
"""Assumed time of one operation of PyTorch on a CPU beside what it computes, autograd's part included."""


class Latency(NamedTuple):
    """Seconds that a collective takes whatever its size: the call, a step inside a node and one between nodes."""

    call_s: float
    link_s: float
    network_s: float


LATENCIES: dict[Link, Latency] = {
    "NVLink": Latency(8.4e-6, 3.4e-6, 14e-6),
    "PCIe": Latency(8.4e-6, 5.7e-6, 14e-6),
}
"""NCCL's own figures for its ring with the Simple protocol (``src/graph/tuning.cc`` of NCCL 2.2x)."""


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
    ``gemm_flops`` is the rate of a large square product, ``attention_flops`` that of attention over many keys.
    ``gemm_corrections`` has measured rates over estimated ones by product and pass. ``sms`` None: shapes make no
    difference. ``figures`` names each rate, and whether it was measured or assumed.
    """

    name: str
    kind: Literal["cuda", "cpu"]
    gemm_flops: float
    fp8_flops: float | None = None
    attention_flops: float
    encoder_flops: float
    copy_bytes_per_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    latency: Latency = Latency(0.0, 0.0, 0.0)
    latency_scale: float = 1.0
    host: HostTimes = HOST_TIMES
    host_scale: float = 1.0
    sms: int | None = None
    gemm_corrections: Mapping[tuple[str, str], float] = field(default_factory=dict)
    memory_bytes: float | None = None
    figures: tuple[str, ...] = ()

    def fits(self, memory_bytes: float) -> bool:
        """Whether the margin stays free; a device of unknown memory takes anything."""
        return self.memory_bytes is None or memory_bytes <= self.memory_bytes * (1 - MARGIN)


def gpu_named(device_name: str) -> str | None:
    """Key of the table for a name such as ``NVIDIA H100 80GB HBM3``, or None."""
    name = device_name.lower()
    if "a100" in name and "40gb" in name:
        return "a100-40"
    # The longest: "h200" has "h20" in it.
    return max((key for key in GPUS if key in name), key=len, default=None)


def peak_flops(device_name: str) -> float | None:
    """Datasheet bf16 FLOP/s, or None for a device that is not in the table."""
    gpu = gpu_named(device_name)
    return GPUS[gpu].bf16_flops if gpu else None


def gpu_device(
    gpu: str,
    *,
    compute: str,
    network_gbps: float | None = None,
    measured: Sequence[Ceiling] = (),
    host: HostTimes = HOST_TIMES,
    gemm_corrections: Mapping[tuple[str, str], float] | None = None,
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
        encoder_flops=sheet.bf16_flops,
        copy_bytes_per_s=copy,
        link_bytes_per_s=assumed(f"{sheet.link}, one direction", sheet.link_bytes_per_s, LINK_SHARE),
        network_bytes_per_s=assumed("network per GPU", (network_gbps or sheet.network_gbps) * 1e9 / 8, LINK_SHARE),
        latency=LATENCIES[sheet.link],
        host=host,
        sms=sheet.sms,
        gemm_corrections=gemm_corrections or {},
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
        encoder_flops=gemm,
        copy_bytes_per_s=copy,
        link_bytes_per_s=copy,
        network_bytes_per_s=copy,
    )
