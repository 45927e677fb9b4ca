"""The Inception-v3 network of FID, in plain torch, with the names of its published weight file.

This is the network of the ``inception-2015-12-05`` graph with 1008 classes, which published FID values are
computed with. It differs from later Inceptions: average pooling excludes padding, the last block uses max pooling,
images are resized without half-pixel centres. Names and shapes are those of pytorch-fid's conversion; a state dict
with others is refused. torchvision's Inception is not used: it cannot be imported beside a CPU build of torch.

Shape letters: B batch, C channels, Y rows, X columns.
"""

import hashlib
import textwrap
from collections import OrderedDict
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


class Features(NamedTuple):
    """``pool_BF`` (B, 2048) of FID; ``spatial_BF`` (B, 2023) of sFID in the order (row, column, channel)."""

    pool_BF: Tensor
    spatial_BF: Tensor


Kernel = int | tuple[int, int]
Step = tuple[int, *tuple[Kernel, ...]]
"""One step of a branch: its output channels and its kernel, or several kernels on the same input."""


def _unit(inputs: int, outputs: int, kernel: Kernel, *, stride: int = 1, padding: str = "valid") -> nn.Module:
    """Convolution without bias, batch norm by stored statistics, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs, eps=1e-3), relu=nn.ReLU()))


class Block(nn.Module):
    """Branches side by side, each a chain of steps, whose results are concatenated.

    ``pool`` feeds ``branch_pool``. A block without that branch halves the positions: its last steps have stride 2,
    and the pooled input is a result itself. The weights of ``branch`` are named ``branch_1``, ``branch_2`` and so
    on, with a and b for two kernels, or only ``branch`` if it has one step.
    """

    def __init__(self, inputs: int, pool: nn.Module, **branches: list[Step]) -> None:
        super().__init__()
        self._pool, self._has_pool_branch = pool, "branch_pool" in branches
        self._chains: dict[str, list[list[str]]] = {branch: [] for branch in branches}
        for branch, steps in branches.items():
            width = inputs
            for number, (outputs, *kernels) in enumerate(steps, start=1):
                prefix = f"{branch}_{number}" if len(steps) > 1 else branch
                names = [prefix] if len(kernels) == 1 else [f"{prefix}{letter}" for letter in "ab"]
                halves = number == len(steps) and not self._has_pool_branch
                for name, kernel in zip(names, kernels, strict=True):
                    stride, padding = (2, "valid") if halves else (1, "same")
                    self.add_module(name, _unit(width, outputs, kernel, stride=stride, padding=padding))
                self._chains[branch].append(names)
                width = outputs

    def forward(self, x: Tensor) -> Tensor:
        pooled, results = self._pool(x), []
        for branch, chain in self._chains.items():
            last = [pooled if branch == "branch_pool" else x]
            for names in chain:
                last = [self.get_submodule(name)(last[0]) for name in names]
            results += last
        return torch.cat(results if self._has_pool_branch else [*results, pooled], dim=1)


def _mean_pool() -> nn.Module:
    """3 x 3 mean without padding, as in the graph."""
    return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)


def _block35(inputs: int, pooled: int) -> Block:
    """On 35 x 35 positions; 224 + ``pooled`` channels out."""
    return Block(
        inputs,
        _mean_pool(),
        branch1x1=[(64, 1)],
        branch5x5=[(48, 1), (64, 5)],
        branch3x3dbl=[(64, 1), (96, 3), (96, 3)],
        branch_pool=[(pooled, 1)],
    )


def _block17(width: int) -> Block:
    """On 17 x 17 positions with 7x7 kernels factored into 1x7 and 7x1; 768 channels in and out."""
    row, column = (1, 7), (7, 1)
    return Block(
        768,
        _mean_pool(),
        branch1x1=[(192, 1)],
        branch7x7=[(width, 1), (width, row), (192, column)],
        branch7x7dbl=[(width, 1), (width, column), (width, row), (width, column), (192, row)],
        branch_pool=[(192, 1)],
    )


def _block8(inputs: int, pool: nn.Module) -> Block:
    """On 8 x 8 positions; 2048 channels out."""
    row, column = (1, 3), (3, 1)
    return Block(
        inputs,
        pool,
        branch1x1=[(320, 1)],
        branch3x3=[(384, 1), (384, row, column)],
        branch3x3dbl=[(448, 1), (384, 3), (384, row, column)],
        branch_pool=[(192, 1)],
    )


class Inception(nn.Module):
    """uint8 images to :class:`Features`; ``digest`` is the SHA-256 of the weight file, empty without one."""

    digest = ""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _unit(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = _unit(32, 32, 3)
        self.Conv2d_2b_3x3 = _unit(32, 64, 3, padding="same")
        self.Conv2d_3b_1x1 = _unit(64, 80, 1)
        self.Conv2d_4a_3x3 = _unit(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block35(192, 32), _block35(256, 64), _block35(288, 64)
        halve = nn.MaxPool2d(3, stride=2)
        self.Mixed_6a = Block(288, halve, branch3x3=[(384, 3)], branch3x3dbl=[(64, 1), (96, 3), (96, 3)])
        self.Mixed_6b, self.Mixed_6c = _block17(128), _block17(160)
        self.Mixed_6d, self.Mixed_6e = _block17(160), _block17(192)
        self.Mixed_7a = Block(
            768,
            halve,
            branch3x3=[(192, 1), (320, 3)],
            branch7x7x3=[(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)],
        )
        self.Mixed_7b = _block8(1280, _mean_pool())
        self.Mixed_7c = _block8(2048, nn.MaxPool2d(3, stride=1, padding=1))
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
            spatial = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
            x = self.Mixed_6e(self.Mixed_6d(x))
            x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
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
    position = (torch.arange(target, dtype=like.dtype) * scale).to(like.device)
    low = position.floor()
    return low.long(), (low + 1).clamp(max=source - 1).long(), position - low


def load_inception(path: Path, device: torch.device) -> Inception:
    """The network with the weights of ``path``, on ``device``.

    Raises :class:`ConfigError` with the name and URL of the published file if ``path`` is missing, not a file of
    tensors, or has other names or shapes. No code in the file is executed.
    """
    with torch.device("meta"):
        model = Inception()
    model = model.to_empty(device="cpu")
    try:
        # A plain dict has no version, so torch takes files from before batch norm had counters.
        model.load_state_dict(dict(torch.load(path, map_location="cpu", weights_only=True)))
    except Exception as error:  # of a damaged file torch raises almost any kind
        reason = textwrap.shorten(str(error) or type(error).__name__, 240)
        raise ConfigError(
            f"Inception weights {path} are not those of this network ({reason}). Expected {WEIGHTS_NAME}: "
            f"download it from {WEIGHTS_URL}"
        ) from error
    with path.open("rb") as file:
        model.digest = hashlib.file_digest(file, "sha256").hexdigest()
    return model.eval().requires_grad_(False).to(device)
