"""Count what a piece of training asks of the device, and how often it makes the host wait.

An operation is a call of one of torch's own functions below autograd, whether it came from a
forward pass, a backward pass or an optimizer; on a GPU it launches one kernel or, if it takes a
list of tensors, a few. Views and allocations launch none and are left out. A wait is a read of a
result by the host, which must first let the device finish everything before it. Both are properties
of the program, so they can be counted on a CPU. Compiled code is not seen: see `torch.profiler`.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Operations(TorchDispatchMode):
    """Operations and waits since the start, by name.

    Args:
        device: Device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.launched: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        """Count a call and make it.

        Args:
            func: Operation.
            types: Of its tensor subclasses.
            args: Its arguments.
            kwargs: Its named arguments.
        """
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if func in _READS or (func in _COPIES and self._is_waiting_copy(func, args, result)):
            self.waits[name] += 1
        if not func.is_view and name not in _ALLOCATIONS:
            self.launched[name] += 1
        return result

    def _is_waiting_copy(self, func: Any, args: Any, result: torch.Tensor) -> bool:
        """Return whether the copy brings numbers of a GPU to memory that it cannot write itself."""
        source = args[1] if func is torch.ops.aten.copy_.default else args[0]
        if not (source.is_cuda and result.device.type == "cpu"):
            return False
        return not result.is_pinned()


class _HostReads(TorchFunctionMode):
    """Counts reads of tensors on a CPU, which need no operation."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy"):
            self._waits[name] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted(device: torch.device) -> Iterator[Operations]:
    """Count operations and waits of a block.

    Args:
        device: Device that trains; on a CPU every read of a tensor counts as a wait.
    """
    with contextlib.ExitStack() as stack:
        operations = Operations(device)
        waits = operations.waits
        for owner, name in (
            (torch.cuda, "synchronize"),
            (torch.cuda.Event, "synchronize"),
            (torch.cuda.Stream, "synchronize"),
            *_deepspeed_device(),
        ):
            original = getattr(owner, name)

            def waiting(*args: Any, _call: Any = original, _name: str = name, **kwargs: Any) -> Any:
                waits[_name] += 1
                return _call(*args, **kwargs)

            stack.enter_context(mock.patch.object(owner, name, waiting))
        if device.type == "cpu":
            stack.enter_context(_HostReads(waits))
        yield stack.enter_context(operations)


def _deepspeed_device() -> list[tuple[Any, str]]:
    """Return DeepSpeed's device where it is a CPU, whose `synchronize` does nothing."""
    module = sys.modules.get("deepspeed.accelerator")
    device = module.get_accelerator() if module else None
    return [(type(device), "synchronize")] if device and device.device_name() == "cpu" else []
