"""Checks of what each rank is: its versions, its configuration, its device."""

import hashlib
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from deco_scale.config import RunConfig, dump_config
from deco_scale.distributed.collectives import gather_objects
from launcher.preflight.report import Check, RankInfo, check_same, format_range, problems_by_rank

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("deepspeed", "megatron-core", "transformers", "triton", "transformer-engine", "numpy", "boto3")
SOURCES = ("deco_scale", "data_pipeline", "launcher")
FREE_SHARE = 0.9
"""Of a GPU's memory, below which something else is taken to hold it; the driver's own part is smaller."""
SPEED_SHARE = 0.8
"""Of the median rank's speed, below which a GPU is refused: every step waits for the slowest."""


def read_versions() -> dict[str, str]:
    """Versions of what must be the same on all ranks; ``absent`` where a package is not installed."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        versions["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        versions["driver"] = _ask_smi("driver_version", device=None) or "unknown"
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    commit = _output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    versions["git commit"] = commit[:12] if commit else "not a git checkout"
    versions["source"] = source_digest()
    return versions


def source_digest() -> str:
    """Of the Python files that training imports; it also tells apart what is not committed."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_versions(versions: Mapping[str, str], ranks: Sequence[RankInfo]) -> list[Check]:
    """All ranks together."""
    return check_same(gather_objects(versions), ranks, advice="install the same there")


def check_config(cfg: RunConfig, ranks: Sequence[RankInfo]) -> list[Check]:
    """Whether all ranks resolved the same configuration. All ranks together."""
    digest = hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:16]
    advice = "give every node the same --config file and the same overrides"
    return check_same(gather_objects({"digest": digest}), ranks, advice=advice)


def check_devices(device: torch.device, ranks: Sequence[RankInfo]) -> list[Check]:
    """Kind, memory, arithmetic and speed of every rank's device. All ranks together."""
    gpu = device.type == "cuda"
    if gpu:
        name, free_and_total = torch.cuda.get_device_name(device), torch.cuda.mem_get_info(device)
    else:
        host = psutil.virtual_memory()
        name, free_and_total = f"{platform.machine()} with {os.cpu_count()} cores", (host.available, host.total)
    memory_gib = [size / 2**30 for size in free_and_total]
    mine = {"device": name}, products_are_exact(device), speed_tflops(device), memory_gib, _smi_facts(device)
    names, exact, speeds, memory, smi = zip(*gather_objects(mine), strict=True)
    median = statistics.median_high(speeds)

    def little_memory(free_and_total: Sequence[float]) -> str | None:
        free, total = free_and_total
        text = f"{free:.1f} of {total:.1f} GiB are free; end the processes that use the rest (see nvidia-smi)"
        return text if gpu and free < FREE_SHARE * total else None

    def slow(speed: float) -> str | None:
        text = f"{speed:.0f} TFLOP/s, the median rank {median:.0f}; look for heat, power limits and other jobs"
        # Ranks that share a CPU are slow by turns.
        return text if gpu and speed < SPEED_SHARE * median else None

    advice = "its device computes wrong sums: take the node out of service"
    wrong = problems_by_rank(ranks, exact, lambda ok: None if ok else advice)
    free_gib = format_range([free for free, _ in memory], ranks, "GiB")
    return [
        *check_same(names, ranks, advice="take nodes of one kind, or parallel settings for the slowest"),
        Check("free memory", free_gib, problems_by_rank(ranks, memory, little_memory)),
        Check("products of small integers", "wrong results" if wrong else "exact", wrong),
        Check("matrix product", format_range(speeds, ranks, "TFLOP/s"), problems_by_rank(ranks, speeds, slow)),
        _smi_check(smi, ranks),
    ]


def products_are_exact(device: torch.device) -> bool:
    """Whether a product of matrices of integers from -8 to 8 is exact.

    All sums stay below 2^24, so that fp32, TF32 and any order of summation give the same: another result is a
    fault of the hardware.
    """
    side = 4096 if device.type == "cuda" else 256
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (side, side), generator=generator) for _ in range(2))
    product = (a.float().to(device) @ b.float().to(device)).cpu()
    # In float64 on the host, also exact, and faster than integers.
    return torch.equal(product.double(), a.double() @ b.double())


def speed_tflops(device: torch.device) -> float:
    """TFLOP/s of a matrix product, bf16 on a GPU and fp32 on a CPU, by the fastest of five."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 256
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times) / 1e12


def _smi_facts(device: torch.device) -> tuple[str, str]:
    """Temperature and uncorrected ECC errors since the driver was loaded, empty where they cannot be asked for."""
    fields = "temperature.gpu,ecc.errors.uncorrected.volatile.total"
    answer = _ask_smi(fields, device=device) if device.type == "cuda" else None
    temperature, _, errors = (answer or "").partition(",")
    return temperature.strip(), errors.strip()


def _smi_check(smi: Sequence[tuple[str, str]], ranks: Sequence[RankInfo]) -> Check:
    temperatures, ecc_errors = zip(*smi, strict=True)
    if not any(temperatures):
        return Check("nvidia-smi", "not available: nothing to ask")

    def describe(errors: str) -> str | None:
        wrong = errors.isdigit() and int(errors)
        return f"{errors} uncorrected ECC errors; reset the GPU or take the node out" if wrong else None

    hottest = max((int(each) for each in temperatures if each.isdigit()), default=None)
    value = "no temperature" if hottest is None else f"at most {hottest} C"
    return Check("nvidia-smi", value, problems_by_rank(ranks, ecc_errors, describe))


def _ask_smi(fields: str, *, device: torch.device | None) -> str | None:
    """Answer of ``nvidia-smi`` for one GPU, None where it cannot be asked."""
    one = [] if device is None else ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    answer = _output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", *one)
    return answer.splitlines()[0].strip() if answer else None


def _output_of(*command: str) -> str | None:
    """What a command prints, None where it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
