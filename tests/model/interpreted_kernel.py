"""Runs the Triton kernel on a CPU in Triton's interpreter, for tests; in a process of its own.

Triton compiles or interprets a kernel by an environment variable when the kernel is defined.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from svfap_dist.video.frames import YuvClips


class KernelCall(NamedTuple):
    """Arguments of `planes.patches_and_targets`; arrays, because they go through a pipe."""

    planes: dict[str, np.ndarray]
    size: int
    visible: np.ndarray
    masked: np.ndarray
    patch: tuple[int, int]
    dtype: str = "float32"

    @property
    def clips(self) -> YuvClips:
        """The planes as tensors."""
        return YuvClips(**{k: torch.from_numpy(v) for k, v in self.planes.items()}, size=self.size)


class KernelResult(NamedTuple):
    """What the kernel returned as float32, and the bytes that its programs touched."""

    seen: np.ndarray
    targets: np.ndarray
    bytes_touched: int


def run_interpreted(call: KernelCall) -> KernelResult:
    """Run the kernel in this process, which must be new."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    from svfap_dist.model import plane_kernel

    touched: dict[tuple[int, ...], set[int]] = {}  # addresses of bytes, by program
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(self: Any, pointers: Any, mask: Any) -> None:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        for address in pointers.data[np.broadcast_to(mask.data, pointers.data.shape)].ravel():
            touched.setdefault(self.grid_idx, set()).update(range(address, address + itemsize))

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        note(self, pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note(self, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    visible, masked = torch.from_numpy(call.visible), torch.from_numpy(call.masked)
    with (
        mock.patch.object(builder, "create_masked_load", counting_load),
        mock.patch.object(builder, "create_masked_store", counting_store),
    ):
        results = plane_kernel.patches_and_targets(
            call.clips, visible, masked, call.patch, getattr(torch, call.dtype)
        )
    seen, targets = (result.float().numpy() for result in results)
    return KernelResult(seen, targets, sum(map(len, touched.values())))
