"""Linear layers, by whichever of torch's two CPU libraries is the faster one.

torch gives float32 matrix products to MKL, and convolutions to oneDNN. MKL keeps its AVX-512 code
from CPUs that are not Intel's: there a product takes twice as long as the same numbers taken for a
convolution with a 1 x 1 kernel over images whose pixels are the tokens. (`svfap bench model` prints
both rates.) On GPUs, on Intel's CPUs, for other types, for few rows and in compiled programs,
`torch.nn.functional.linear` runs.
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
# as it did before, bit by bit. What follows goes by the number of rows alone for the same reason.
_CONVOLUTIONS = _prefers_convolutions()
# Below so many rows a convolution's own preparations cost more than it saves.
_FEWEST_ROWS = 256
# In a process with a single thread torch sends convolutions over fewer images to MKL after all.
_FEWEST_IMAGES = 16


def use_convolutions(wanted: bool) -> None:
    """Let the linear layers of this process be convolutions where that pays, or never."""
    global _CONVOLUTIONS  # noqa: PLW0603  # a process has one CPU
    _CONVOLUTIONS = wanted and _prefers_convolutions()


def uses_convolutions() -> bool:
    """Whether large float32 linear layers on the CPU are computed as convolutions."""
    return _CONVOLUTIONS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: [..., D], [O, D] and [O] -> [..., O]."""
    is_theirs = x.device.type == "cpu" and x.dtype is torch.float32
    # Not when compiled: under torch 2.13's inductor a run of these ended in a non-finite loss.
    if _CONVOLUTIONS and is_theirs and not torch.compiler.is_compiling():
        images = _num_images(x.shape[:-1].numel())
        if images:
            return by_convolution(x, weight, bias, images)
    return F.linear(x, weight, bias)


def _num_images(rows: int) -> int:
    """Images of equal size into which `rows` are laid for a convolution; 0 where none is faster."""
    if rows < _FEWEST_ROWS:
        return 0
    for images in range(_FEWEST_IMAGES, 2 * _FEWEST_IMAGES):
        if rows % images == 0:
            return images
    return 1  # which is faster with several threads only


def by_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, images: int) -> Tensor:
    """The same as a convolution over so many images, which must divide the rows of x."""
    rows = x.reshape(images, 1, -1, x.shape[-1])
    # [images, D, 1, rows of an image], channels last
    out = F.conv2d(rows.permute(0, 3, 1, 2), weight[:, :, None, None], bias)
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
