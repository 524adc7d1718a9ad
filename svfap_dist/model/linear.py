"""Linear layers, by whichever of torch's two CPU libraries is the faster one.

torch gives float32 matrix products to MKL, and convolutions to oneDNN. MKL keeps its AVX-512 code
from CPUs that are not Intel's: there a product takes twice as long as the same numbers taken for a
convolution with a 1 x 1 kernel over one image, which is a row of all tokens. (`svfap bench model`
prints both rates.) On GPUs, on Intel's CPUs and for other types, `torch.nn.functional.linear` runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _prefers_convolutions() -> bool:
    """Whether this CPU has AVX-512, but not from Intel."""
    capability = torch.backends.cpu.get_cpu_capability()
    if not (capability.startswith("AVX512") and torch.backends.mkldnn.is_available()):
        return False
    try:
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: nothing is known
        return False


# Decided once and by the make of the CPU, not by a measurement: a run that is resumed must compute
# as it did before, bit by bit.
_CONVOLUTIONS = _prefers_convolutions()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., D], [O, D] and [O] -> [..., O]."""
    if not (_CONVOLUTIONS and x.device.type == "cpu" and x.dtype is torch.float32):
        return F.linear(x, weight, bias)
    return by_convolution(x, weight, bias)


def by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as a convolution."""
    row = x.reshape(1, 1, -1, x.shape[-1]).permute(0, 3, 1, 2)  # [1, D, 1, rows], channels last
    out = F.conv2d(row, weight[:, :, None, None], bias)
    return out.permute(0, 2, 3, 1).reshape(*x.shape[:-1], len(weight))  # moves nothing


class Linear(nn.Linear):
    """A linear layer: [..., D] -> [..., O]."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Projection(nn.Linear):
    """A linear layer whose bias comes with the call: [..., D] -> [..., outputs].

    The layer itself runs, rather than its weight being borrowed, because ZeRO-3 gathers a module's
    weights when that module runs.
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__(dim, outputs, bias=False)

    def forward(self, input: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(input, self.weight, bias)
