"""Setting of the kernels."""

from typing import Literal

KernelSetting = Literal["auto", "triton", "torch"]
