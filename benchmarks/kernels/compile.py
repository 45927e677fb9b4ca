"""Compile the Triton kernels for an H100 without having one, from the launches of a training step.

A training step runs on fake tensors, which have shapes, strides and types but no values, and the operators it
calls are noted. Then each operator's own launch code runs with meta tensors, while Triton compiles instead of
launching: what is compiled here is what the product would launch, specialisation of the arguments included.
Registers and spills are read from the machine code; no kernel runs.

Differences from a step on a GPU: transformer blocks are one of each kind, since all are alike; tensors begin at
multiples of 16 bytes, as those of the allocator do; and operators follow the CPU's list of autocast, which treats
all that feeds a kernel as CUDA's does.
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from rich.console import Console
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from benchmarks import record
from deco_scale.config import RunConfig, load_config
from deco_scale.kernels.adamw import AdamWStep, AdamWTensors, adamw_ema
from deco_scale.kernels.select import use_kernels
from deco_scale.models import Denoiser
from deco_scale.objectives import Objective
from deco_scale.objectives.frequency import block_transform, colour_matrix, frequency_weights
from deco_scale.training.config import StageConfig

FILE = "kernels_sm90.json"
"""Figures by version of Triton and kernel."""
TARGET = GPUTarget("cuda", 90, 32)
SHARED_LIMIT = 232_448
"""Bytes of shared memory that a block may have on an H100 (227 KiB; CUDA C Programming Guide, compute 9.0)."""
CONFIGS = ("t2i_xxl.yaml", "c2i_xl.yaml")
"""The released models: text to image, and class to image, whose norms round elsewhere."""
WIDEST = 64
"""Width of a decoder that takes most: compiled besides the configurations'."""
SHORT = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip
MODES = {"bf16": torch.bfloat16, "fp32": None}
"""Types of autocast by ``precision.compute``."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one thread (registers, bytes of stack) and one program (warps, bytes of shared memory) take.

    The stack holds spilled registers, and in kernels with sines 32 bytes besides (Triton up to 3.8).
    """

    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """All of a tensor but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor) -> "TensorLayout":
        return cls(tuple(x.shape), tuple(x.stride()), int(x.storage_offset()), x.dtype)

    def on_meta(self) -> Tensor:
        reach = [(size - 1) * stride for size, stride in zip(self.shape, self.stride, strict=True)]
        length = self.offset + sum(reach) + 1
        # Its address, which Triton asks for, is the offset in bytes.
        return torch.empty(length, dtype=self.dtype, device="meta").as_strided(
            self.shape, self.stride, self.offset
        )


Call = tuple[str, tuple[Any, ...]]
"""Name of an operator, and its arguments with a :class:`TensorLayout` for each tensor."""


class OfflineDriver:
    """As much of a driver as compiling takes."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder(TorchDispatchMode):
    """Notes the calls of this project's operators with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "deco_scale":
            assert not kwargs
            noted = [TensorLayout.of(a) if isinstance(a, Tensor) else a for a in args]
            self.calls.append((func._schema.name, tuple(noted)))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def compiling(shared_limit: int = SHARED_LIMIT) -> Iterator[dict[str, Compiled]]:
    """Within it launches compile only; yields what they were, by kernel, types of its tensors and constants.

    A kernel above ``shared_limit`` fails as it would at launch, with Triton's ``OutOfResources``.
    """
    found: dict[str, Compiled] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        one = Compiled(kernel.metadata.num_warps, *resource_usage(kernel), kernel.metadata.shared)
        name = name_of(self, args, kwargs)
        # Strides that 16 divides or that are 1 make variants of one name: the table has the largest figures.
        pairs = zip(dataclasses.astuple(one), dataclasses.astuple(found.get(name, one)), strict=True)
        found[name] = Compiled(*(max(pair) for pair in pairs))
        if one.shared_bytes > shared_limit:
            raise OutOfResources(one.shared_bytes, shared_limit, "shared memory")

    driver.set_active(OfflineDriver())  # type: ignore[arg-type]
    with mock.patch.object(JITFunction, "run", compile_only):
        yield found


def name_of(kernel: JITFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """For instance ``adaln gated_residual_forward bf16 bf16 bf16 bf16 TOKENS=4 BLOCK=2048``."""
    module = kernel.__module__.rpartition(".")[2].removesuffix("_device")
    tensors = [a for a in args if a is None or isinstance(a, Tensor)]
    types = ["-" if a is None else SHORT[a.dtype] for a in tensors]
    constants = [f"{key}={int(value) if isinstance(value, bool) else value}" for key, value in kwargs.items()]
    return " ".join([module, kernel.__name__.strip("_"), *types, *(c for c in constants if c[0].isupper())])


def resource_usage(kernel: Any) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", said)
    if usage is None:
        raise ValueError(f"cuobjdump says nothing of registers: {said}")
    return int(usage[1]), int(usage[2])


def compile_kernels(configs: Sequence[RunConfig], say: Callable[[str], None]) -> dict[str, Compiled]:
    """Every kernel of a training step of each stage, under autocast and in fp32, and of the optimizer.

    Raises ``ValueError`` where Triton interprets, and what the launch raises where one does not fit the GPU.
    """
    if triton.knobs.runtime.interpret:
        raise ValueError("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    steps = [(cfg, stage, mode) for cfg in configs for stage in cfg.stages for mode in MODES]
    calls = [call for step in steps for call in step_calls(*step)]
    first = configs[0]
    widest = dataclasses.replace(first, model=dataclasses.replace(first.model, decoder_width=WIDEST))
    for mode in MODES:
        calls += [call for call in step_calls(widest, first.stages[0], mode) if "render_pixels" in call[0]]
    with compiling() as found:
        for name, args in dict.fromkeys(calls):
            say(name)
            # The implementation by itself: dispatched, meta tensors would go to the rule for shapes.
            OPDEFS[name]._init_fn(*(a.on_meta() if isinstance(a, TensorLayout) else a for a in args))
        say("AdamW")
        optimizer_step()
    return found


def step_calls(cfg: RunConfig, stage: StageConfig, mode: str) -> list[Call]:
    """Operators that a forward and a backward pass call."""
    model = dataclasses.replace(cfg.model, num_blocks=1, num_text_blocks=min(1, cfg.model.num_text_blocks))
    # REPA has no kernel and would need more blocks.
    losses = dataclasses.replace(cfg.objective, repa_weight=0.0)
    cpu = torch.device("cpu")
    # These are kept for later calls, which would not want fake ones.
    block_transform(cpu), colour_matrix(cpu)
    frequency_weights(losses.freq_quality, gamma=losses.freq_gamma, mode=losses.freq_mode, device=cpu)
    with FakeTensorMode(allow_non_fake_inputs=True), Recorder() as recorder:
        objective = Objective(Denoiser(model), losses, encoder_dim=1)
        use_kernels(objective, "triton")
        image = torch.empty(stage.micro_batch, model.channels, stage.resolution, stage.resolution)
        t, condition = torch.empty(len(image)), torch.empty(len(image), model.text_tokens, model.text_dim)
        if model.kind != "t2i_deco":
            condition = torch.zeros(len(image), dtype=torch.int64)
        with torch.autocast("cpu", dtype=MODES[mode], enabled=MODES[mode] is not None):
            loss = objective(image, torch.empty_like(image), t, condition)["loss"]
        loss.backward()
    return recorder.calls


def optimizer_step() -> None:
    """AdamW takes addresses: its launch is the same for all parameters."""
    one = torch.empty((), device="meta")
    betas = (0.9, 0.95)
    tensors = AdamWTensors(**{field.name: [one.reshape(1)] for field in dataclasses.fields(AdamWTensors)})
    step = AdamWStep(
        lr=1e-4, betas=betas, eps=1e-8, weight_decay=0.0, ema_decay=0.9999, count=one, factor=one, skipped=one
    )  # fmt: skip
    adamw_ema(tensors, step, kernels="triton")


def main(out: Path | None, console: Console) -> int:
    """Compile, show a table, and put the figures into a file in the folder ``out``."""
    configs = [load_config(record.ROOT / "configs" / name, []) for name in CONFIGS]
    current = ""

    def say(name: str) -> None:
        nonlocal current
        current = name

    try:
        found = compile_kernels(configs, say)
    except (CompilationError, OutOfResources, ValueError) as error:
        print(f"error: {current or 'no kernel'}: {error}", file=sys.stderr)
        return 1
    title = f"Triton {triton.__version__} for sm_90, compiled without a GPU"
    console.print(f"{title}\nwarps  registers  stack, B a thread    shared, B  kernel", highlight=False)
    for name, one in found.items():
        line = f"{one.num_warps:5}{one.registers:11}{one.stack_bytes:21}{one.shared_bytes:11}  {name}"
        console.print(line, highlight=False, soft_wrap=True)
    if out:
        path = out / FILE
        versions = json.loads(path.read_text()) if path.exists() else {}
        figures = {name: dataclasses.asdict(one) for name, one in sorted(found.items())}
        versions[triton.__version__] = {**record.origin(), "torch": torch.__version__, "kernels": figures}
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(sorted(versions.items())), indent=1) + "\n")
        console.print(f"written to {path}", soft_wrap=True)
    return 0
