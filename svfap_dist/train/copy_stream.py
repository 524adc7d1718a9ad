"""Overlap copies to a GPU with its computation: a step's inputs are made on their own CUDA stream.

In: a batch in the loader's pinned memory, and a function that makes inputs from it. Out: tensors on
the device that the current stream may use. The host queues work ahead of the device, so the copies
and conversions of the next batch overlap with the step that the device still computes. The event
that allows the loader to refill the batch's memory is recorded right after them, on their stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svfap_dist.data.batch import ClipBatch


class CopyStream:
    """Makes inputs on its own stream; on a CPU, or from frames on the device, on the current one.

    Args:
        device: Device of the inputs.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def inputs(
        self, batch: ClipBatch, part: slice, make: Callable[[], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Return the inputs of some clips, and release the batch with its last ones.

        Args:
            batch: The rank's clips, whose parts are requested in order.
            part: Which of them.
            make: Returns their inputs, queued on the current stream.
        """
        if self._stream is None or (isinstance(batch.frames, Tensor) and batch.frames.is_cuda):
            return make()
        current = torch.cuda.current_stream()
        with torch.cuda.stream(self._stream):
            tensors = make()
            if part.stop in (None, len(batch.frames)):
                batch.release()
        current.wait_stream(self._stream)
        for tensor in tensors:  # so that its memory is not used again before the step is done
            tensor.record_stream(current)
        return tensors
