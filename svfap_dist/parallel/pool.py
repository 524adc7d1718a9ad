"""A pool of killable child processes that any number of threads may call.

In: a picklable function and requests. Out: results, or the errors of `child`. A call takes an idle
process, or waits for one. Processes start on demand and live from call to call; one that hung or
crashed is replaced by the next call. The caller decides what such a call is worth: a second chance,
a rejected sample, an error.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Generic, TypeVar

from svfap_dist.parallel.child import ChildProcess, CrashedError

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class ProcessPool(Generic[_Request, _Response]):
    """Calls a function in one of several child processes; see `ChildProcess` for the arguments.

    The processes ignore Ctrl-C: whoever is interrupted has to `kill` and `close` the pool.

    Args:
        function: picklable; called with each request.
        processes: how many there may be, at least 1.
        seconds: deadline of a call; None: no deadline.
        memory_bytes: limit of each child's address space; 0: no limit.
        may_have_children: whether the function may start processes of its own.
    """

    def __init__(
        self,
        function: Callable[[_Request], _Response],
        processes: int,
        *,
        seconds: float | None,
        memory_bytes: int = 0,
        may_have_children: bool = False,
    ) -> None:
        self._children = [
            ChildProcess(
                function,
                seconds=seconds,
                memory_bytes=memory_bytes,
                may_have_children=may_have_children,
                ignore_interrupts=True,
            )
            for _ in range(processes)
        ]
        # Last in, first out: where two processes are enough, no third is started.
        self._idle: queue.LifoQueue[ChildProcess[_Request, _Response]] = queue.LifoQueue()
        for child in self._children:
            self._idle.put(child)
        self._killed = False

    def __call__(self, request: _Request, *, more_seconds: float = 0.0) -> _Response:
        """Call the function in the next idle process.

        Args:
            request: picklable argument of the function.
            more_seconds: added to the deadline of this call.

        Raises:
            HungError: The call missed its deadline.
            CrashedError: The process died; StartError if it has never started.
            CancelledError: The pool was killed.
            Exception: Whatever the function raises.
        """
        child = self._idle.get()
        try:
            if self._killed:
                raise CancelledError
            return child(request, more_seconds=more_seconds)
        except CrashedError as error:
            if self._killed:  # says nothing about the request
                raise CancelledError from error
            raise
        finally:
            self._idle.put(child)

    def kill(self) -> None:
        """Kill all processes for good: calls under way, and later ones, raise CancelledError."""
        self._killed = True
        for child in self._children:
            child.kill()

    def close(self) -> None:
        """End the processes, when no thread calls the pool any more."""
        for child in self._children:
            child.close()
