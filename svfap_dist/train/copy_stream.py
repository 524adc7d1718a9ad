"""Copies to a GPU beside its computation: the inputs of a step on a CUDA stream of their own.

In: a batch in the loader's pinned memory, and what makes inputs of it. Out: tensors on the device
that the current stream may use. The host queues work ahead of the device, so while the device still
computes a step, the copies and conversions of the next batch run beside it. The event that lets the
loader fill the batch's memory again is recorded behind the copies, and behind no other work.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svfap_dist.data.batch import ClipBatch


class CopyStream:
    """Makes inputs on a stream of its own; on a CPU, or of frames that are on the device, at once.

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
