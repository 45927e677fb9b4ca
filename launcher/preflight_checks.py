"""Checks of what each rank is: its versions, its configuration, its device."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from deco_scale.config import RunConfig, dump_config
from launcher.preflight_report import Group, Place, Row, gathered, same_everywhere, span

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("deepspeed", "megatron-core", "transformers", "triton", "transformer-engine", "numpy", "boto3")
SOURCES = ("deco_scale", "data_pipeline", "launcher")
FREE_SHARE = 0.9
"""Of a GPU's memory, below which something else is taken to hold it; the driver's own part is smaller."""
SPEED_SHARE = 0.8
"""Of the median rank's speed, below which a GPU is refused: every step waits for the slowest."""
_SMI = ("temperature.gpu", "ecc.errors.uncorrected.volatile.total")


def read_versions() -> dict[str, str]:
    """Versions of what must be the same on all ranks; ``absent`` where a package is not installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    found["CUDA of torch"] = torch.version.cuda or "none"
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["driver"] = _ask_smi("driver_version", device=None) or "not told"
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    found["git commit"] = _git_commit()
    found["source"] = source_digest()
    return found


def source_digest() -> str:
    """Of the Python files that training imports; it also tells apart what is not committed."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def check_versions(versions: dict[str, str], places: Sequence[Place]) -> Group:
    """All ranks together."""
    rows = same_everywhere(gathered(versions), places, advice="install the same there")
    return Group("versions", rows)


def check_config(cfg: RunConfig, places: Sequence[Place]) -> Group:
    """Whether all ranks resolved the same configuration. All ranks together."""
    digest = hashlib.sha256(dump_config(cfg).encode()).hexdigest()[:16]
    advice = "give every node the same --config file and the same overrides"
    return Group("configuration", same_everywhere(gathered({"digest": digest}), places, advice=advice))


def check_devices(device: torch.device, places: Sequence[Place]) -> Group:
    """Kind, memory, arithmetic and speed of every rank's device. All ranks together."""
    kind, exact, speed = device_name(device), products_are_exact(device), speed_tflops(device)
    free, total = free_memory(device)
    everywhere = gathered((kind, exact, speed, free, total, _smi_facts(device)))
    names = [{"device": found[0]} for found in everywhere]
    rows = [*same_everywhere(names, places, advice="take nodes of one kind, or parallel settings for the slowest")]
    rows.append(_memory_row([(found[3], found[4]) for found in everywhere], places, device))
    wrong = [place for place, found in zip(places, everywhere, strict=True) if not found[1]]
    told = "wrong results" if wrong else "exact"
    advice = "its device computes wrong sums: take the node out of service"
    rows.append(Row("products of small integers", told, tuple(f"{place}: {advice}" for place in wrong)))
    rows.append(_speed_row([found[2] for found in everywhere], places, device))
    rows += _smi_rows([found[5] for found in everywhere], places)
    return Group("devices", tuple(rows))


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind and number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} with {os.cpu_count()} cores"


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and all bytes, of the GPU or of the host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    memory = psutil.virtual_memory()
    return memory.available, memory.total


def products_are_exact(device: torch.device, *, side: int | None = None) -> bool:
    """Whether a product of matrices of integers from -8 to 8 is exact.

    All sums stay below 2^24, so that fp32, TF32 and any order of summation give the same: another result is a
    fault of the hardware.
    """
    side = side or (4096 if device.type == "cuda" else 256)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (side, side), generator=generator) for _ in range(2))
    found = (a.float().to(device) @ b.float().to(device)).cpu()
    # In float64 on the host, also exact, and faster than integers.
    return torch.equal(found.double(), a.double() @ b.double())


def speed_tflops(device: torch.device) -> float:
    """TFLOP/s of a matrix product, bf16 on a GPU and fp32 on a CPU, by the fastest of five."""
    gpu = device.type == "cuda"
    side = 8192 if gpu else 256
    a = torch.ones(side, side, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        result = a @ a
        if gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del result
    return 2 * side**3 / best / 1e12


def _memory_row(found: Sequence[tuple[int, int]], places: Sequence[Place], device: torch.device) -> Row:
    value = span([free / 2**30 for free, _ in found], places, "GiB")
    if device.type != "cuda":
        return Row("free memory", value)
    problems = [
        f"{place}: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; end what holds the rest (nvidia-smi)"
        for place, (free, total) in zip(places, found, strict=True)
        if free < FREE_SHARE * total
    ]
    return Row("free memory", value, tuple(problems))


def _speed_row(found: Sequence[float], places: Sequence[Place], device: torch.device) -> Row:
    value = span(found, places, "TFLOP/s")
    if device.type != "cuda":
        # Ranks that share a processor are slow by turns.
        return Row("matrix product", value)
    median = sorted(found)[len(found) // 2]
    problems = [
        f"{place}: {speed:.0f} TFLOP/s, the median rank {median:.0f}; look for heat, power limits and other jobs"
        for place, speed in zip(places, found, strict=True)
        if speed < SPEED_SHARE * median
    ]
    return Row("matrix product", value, tuple(problems))


def _smi_facts(device: torch.device) -> dict[str, str]:
    if device.type != "cuda":
        return {}
    answers = _ask_smi(",".join(_SMI), device=device)
    return dict(zip(_SMI, (part.strip() for part in answers.split(",")), strict=False)) if answers else {}


def _smi_rows(found: Sequence[dict[str, str]], places: Sequence[Place]) -> list[Row]:
    """Temperatures, and GPUs with uncorrected memory errors since the driver was loaded."""
    if not any(found):
        return [Row("nvidia-smi", "not available: nothing to ask")]
    problems = []
    for place, facts in zip(places, found, strict=True):
        errors = facts.get(_SMI[1], "")
        if errors.isdigit() and int(errors):
            problems.append(f"{place}: {errors} uncorrected memory errors; reset the GPU or take the node out")
    hottest = max((int(f[_SMI[0]]) for f in found if f.get(_SMI[0], "").isdigit()), default=None)
    return [Row("nvidia-smi", "no temperature" if hottest is None else f"{hottest} C at most", tuple(problems))]


def _ask_smi(fields: str, *, device: torch.device | None) -> str | None:
    """Answer of ``nvidia-smi`` for one GPU, None where it cannot be asked."""
    words = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if device is not None:
        words += ["-i", f"GPU-{torch.cuda.get_device_properties(device).uuid}"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.splitlines()[0].strip() if answer.stdout.strip() else None


def _git_commit() -> str:
    words = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=30, check=True).stdout.strip()[:12]
    except (OSError, subprocess.SubprocessError):
        return "not a git checkout"
