"""The Inception-v3 network of FID, in plain torch, with the names of its published weight file.

This is the network of the ``inception-2015-12-05`` graph with 1008 classes, which published FID values are
computed with. It differs from later Inceptions: average pooling excludes padding, the last block uses max pooling,
images are resized without half-pixel centres. Names and shapes are those of pytorch-fid's conversion; a state dict
with others is refused. torchvision's Inception is not used: it cannot be imported beside a CPU build of torch.

Shape letters: B batch, C channels, Y rows, X columns.
"""

import hashlib
import pickle
import struct
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deco_scale.errors import ConfigError

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
PUBLISHED_SHA256 = "6726825d"
"""The published file's name ends with the start of its SHA-256."""
SIDE, NUM_CLASSES = 299, 1008
POOL_DIM = 2048
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17
SPATIAL_DIM = SPATIAL_CHANNELS * SPATIAL_SIDE**2

_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    struct.error,
    pickle.UnpicklingError,
)
"""What torch raises for corrupted or truncated files."""


class Features(NamedTuple):
    """``pool_BF`` (B, 2048) of FID; ``spatial_BF`` (B, 2023) of sFID in the order (row, column, channel)."""

    pool_BF: Tensor
    spatial_BF: Tensor


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm by stored statistics, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x_BCYX: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x_BCYX)))


def _mean_pool(x_BCYX: Tensor) -> Tensor:
    """3 x 3 mean without padding, as in the graph."""
    return F.avg_pool2d(x_BCYX, 3, stride=1, padding=1, count_include_pad=False)


class Mixed35(nn.Module):
    """Block on 35 x 35 positions: 1x1, 5x5, twice 3x3, and pooled branch; 224 + ``pooled`` channels out."""

    def __init__(self, inputs: int, pooled: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(inputs, 64, 1)
        self.branch5x5_1 = ConvUnit(inputs, 48, 1)
        self.branch5x5_2 = ConvUnit(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, padding=1)
        self.branch_pool = ConvUnit(inputs, pooled, 1)

    def forward(self, x: Tensor) -> Tensor:
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_mean_pool(x))], dim=1)


class Reduce35(nn.Module):
    """35 x 35 to 17 x 17 positions; 480 channels are added."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3 = ConvUnit(inputs, 384, 3, stride=2)
        self.branch3x3dbl_1 = ConvUnit(inputs, 64, 1)
        self.branch3x3dbl_2 = ConvUnit(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = ConvUnit(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), three, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed17(nn.Module):
    """Block on 17 x 17 positions with 7x7 kernels factored into 1x7 and 7x1; 768 channels in and out."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branch1x1 = ConvUnit(inputs, 192, 1)
        self.branch7x7_1 = ConvUnit(inputs, width, 1)
        self.branch7x7_2 = ConvUnit(width, width, (1, 7), padding=(0, 3))
        self.branch7x7_3 = ConvUnit(width, 192, (7, 1), padding=(3, 0))
        self.branch7x7dbl_1 = ConvUnit(inputs, width, 1)
        self.branch7x7dbl_2 = ConvUnit(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_3 = ConvUnit(width, width, (1, 7), padding=(0, 3))
        self.branch7x7dbl_4 = ConvUnit(width, width, (7, 1), padding=(3, 0))
        self.branch7x7dbl_5 = ConvUnit(width, 192, (1, 7), padding=(0, 3))
        self.branch_pool = ConvUnit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch1x1(x))

    def join(self, x: Tensor, first: Tensor) -> Tensor:
        """All branches, given the first one's result."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([first, seven, double, self.branch_pool(_mean_pool(x))], dim=1)


class Reduce17(nn.Module):
    """17 x 17 to 8 x 8 positions; 512 channels are added."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.branch3x3_1 = ConvUnit(inputs, 192, 1)
        self.branch3x3_2 = ConvUnit(192, 320, 3, stride=2)
        self.branch7x7x3_1 = ConvUnit(inputs, 192, 1)
        self.branch7x7x3_2 = ConvUnit(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = ConvUnit(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = ConvUnit(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        seven = self.branch7x7x3_2(self.branch7x7x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(seven))
        return torch.cat([self.branch3x3_2(self.branch3x3_1(x)), seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class Mixed8(nn.Module):
    """Block on 8 x 8 positions; 2048 channels out. ``max_pool``: pool the last branch by maximum."""

    def __init__(self, inputs: int, *, max_pool: bool) -> None:
        super().__init__()
        self._max_pool = max_pool
        self.branch1x1 = ConvUnit(inputs, 320, 1)
        self.branch3x3_1 = ConvUnit(inputs, 384, 1)
        self.branch3x3_2a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = ConvUnit(inputs, 448, 1)
        self.branch3x3dbl_2 = ConvUnit(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = ConvUnit(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = ConvUnit(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = ConvUnit(inputs, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self._max_pool else _mean_pool(x)
        parts = [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """uint8 images to :class:`Features`; ``digest`` is the SHA-256 of the weight file, empty without one."""

    digest = ""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvUnit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvUnit(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvUnit(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = ConvUnit(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvUnit(80, 192, 3)
        self.Mixed_5b = Mixed35(192, 32)
        self.Mixed_5c = Mixed35(256, 64)
        self.Mixed_5d = Mixed35(288, 64)
        self.Mixed_6a = Reduce35(288)
        self.Mixed_6b = Mixed17(768, 128)
        self.Mixed_6c = Mixed17(768, 160)
        self.Mixed_6d = Mixed17(768, 160)
        self.Mixed_6e = Mixed17(768, 192)
        self.Mixed_7a = Reduce17(768)
        self.Mixed_7b = Mixed8(1280, max_pool=False)
        self.Mixed_7c = Mixed8(2048, max_pool=True)
        self.fc = nn.Linear(POOL_DIM, NUM_CLASSES)

    @property
    def published(self) -> bool:
        """Whether these are the weights of published scores."""
        return self.digest.startswith(PUBLISHED_SHA256)

    @torch.no_grad()
    def forward(self, images_BYXC: Tensor) -> Features:
        """Features of uint8 images ``(B, Y, X, 3)`` of any size.

        sFID's are the first 7 channels of the graph's ``mixed_6/conv``, which is ``Mixed_6d.branch1x1`` here,
        as in the ADM suite. TF32 is off, since it would change the scores.
        """
        device = self.fc.weight.device
        x = resize_tf1(images_BYXC.to(device).permute(0, 3, 1, 2).float(), (SIDE, SIDE))
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3((x - 128) / 128)))
            x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
            x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
            x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
            first = self.Mixed_6d.branch1x1(x)
            x = self.Mixed_6e(self.Mixed_6d.join(x, first))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        spatial = first[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        return Features(x.mean(dim=(2, 3)), spatial.reshape(len(x), -1))

    @torch.no_grad()
    def class_scores(self, pool_BF: Tensor) -> Tensor:
        """Logits (B, 1008) without bias, of the Inception score, as in the ADM suite."""
        return F.linear(pool_BF, self.fc.weight)


def resize_tf1(x_BCYX: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize as in TensorFlow 1: output i reads position i * in / out, without antialiasing."""
    low_x, high_x, at_x = _taps(x_BCYX.shape[3], size[1], x_BCYX)
    low_y, high_y, at_y = _taps(x_BCYX.shape[2], size[0], x_BCYX)
    left, right = x_BCYX[..., low_x], x_BCYX[..., high_x]
    rows = left + (right - left) * at_x
    top, bottom = rows[:, :, low_y], rows[:, :, high_y]
    return top + (bottom - top) * at_y[:, None]


def _taps(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index of each target position, and the interpolation weight."""
    scale = torch.tensor(source, dtype=like.dtype) / target
    position = torch.arange(target, dtype=like.dtype) * scale
    low = position.floor()
    high = (low + 1).clamp(max=source - 1)
    taps = low.long(), high.long(), position - low
    return taps[0].to(like.device), taps[1].to(like.device), taps[2].to(like.device)


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights of ``path``, on ``device``.

    Raises :class:`ConfigError` with the name and URL of the published file if ``path`` is missing, not a file of
    tensors, or has other names or shapes. No code in the file is executed.
    """
    if not path.is_file():
        raise ConfigError(f"Inception weights {path}: no such file. {_hint()}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGED as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"Inception weights {path}: not a file of tensors ({reason}). {_hint()}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ConfigError(f"Inception weights {path}: not a dict of tensors. {_hint()}")
    with torch.device("meta"):
        model = Inception()
    # Older torch did not save these counters, and inference does not use them.
    expected = {name: t for name, t in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    actual = {name: t for name, t in state.items() if not str(name).endswith("num_batches_tracked")}
    _check_names(path, actual, expected)
    model = model.to_empty(device="cpu")
    model.load_state_dict(actual, strict=False)
    with path.open("rb") as file:
        model.digest = hashlib.file_digest(file, "sha256").hexdigest()
    return model.eval().requires_grad_(False).to(device)


def _check_names(path: Path, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing, unknown = sorted(expected.keys() - actual.keys()), sorted(map(str, actual.keys() - expected.keys()))
    shapes = [
        f"{name} {tuple(actual[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in actual and actual[name].shape != tensor.shape
    ]
    problems = [
        f"{len(names)} tensors {kind}, such as {', '.join(names[:2])}"
        for kind, names in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise ConfigError(f"Inception weights {path}: another network ({'; '.join(problems)}). {_hint()}")


def _hint() -> str:
    return f"Expected {WEIGHTS_NAME}: download it from {WEIGHTS_URL}"
