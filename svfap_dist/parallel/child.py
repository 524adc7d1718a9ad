"""Work that may hang, crash or eat all memory, in a process of its own.

A damaged video can keep a decoder busy for ever or bring it down, and Python can neither interrupt
nor survive either. So the function is called in a child process: one that does not answer in time
is killed, one that died is noticed, and the next call starts a new one. What is asked and answered
goes through a pipe; large results belong into shared memory that the function fills.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import TracebackType
from typing import Generic, TypeVar

_START_SECONDS = 120.0  # for a child to begin and import what the function needs
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class HungError(Exception):
    """The call took longer than it may; its process was killed."""


class CrashedError(Exception):
    """The process died during the call."""


class Isolated(Generic[_Request, _Response]):
    """Calls `function` in a child process; one call at a time, so one `Isolated` per thread.

    Args:
        function: picklable; called with each request. What it raises is raised again here.
        seconds: longest duration of a call; None: as long as it takes.
        memory_bytes: address space of the child; 0: no limit. Beyond it, allocations in it fail.
        may_have_children: whether the function starts processes of its own.
    """

    def __init__(
        self,
        function: Callable[[_Request], _Response],
        *,
        seconds: float | None,
        memory_bytes: int = 0,
        may_have_children: bool = False,
    ) -> None:
        self._function, self._seconds, self._memory_bytes = function, seconds, memory_bytes
        self._daemon, self._killed = not may_have_children, False
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Isolated[_Request, _Response]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __call__(self, request: _Request, *, more_seconds: float = 0.0) -> _Response:
        """The answer of the function; `more_seconds` are granted to this call.

        Raises: HungError; CrashedError; whatever the function raises.
        """
        if self._killed:
            raise CrashedError("it was killed")
        pipe = self._pipe or self._start()
        if self._killed:  # meanwhile
            raise CrashedError(self._end())
        try:
            pipe.send(request)
            seconds = None if self._seconds is None else self._seconds + more_seconds
            answer = self._answer(pipe, seconds)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise CrashedError(self._end()) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer[0]

    def kill(self) -> None:
        """End the child for good, from another thread: calls, from now on, raise CrashedError."""
        self._killed = True
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """End the child, whatever it does."""
        self._end()

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # no threads or locks of ours in it
        self._pipe, theirs = context.Pipe()
        arguments = self._function, theirs, self._memory_bytes, os.getpid()
        process = context.Process(target=_serve, args=arguments, daemon=self._daemon)
        process.start()
        self._process = process
        theirs.close()
        try:
            self._answer(self._pipe, _START_SECONDS)
        except EOFError as error:
            raise CrashedError(self._end()) from error
        return self._pipe

    def _answer(self, pipe: Connection, seconds: float | None) -> tuple[_Response] | BaseException:
        if not pipe.poll(seconds):
            self._end()
            raise HungError(f"no answer after {seconds:g} s")
        return pipe.recv()

    def _end(self) -> str:
        """Kill the child if it is still there; how it ended."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe:
            pipe.close()
        if process is None:
            return "its process had ended"
        process.join(0.2)  # one that died has its own exit code
        if process.is_alive():
            process.kill()
            process.join()
        return f"its process ended with code {process.exitcode}"


def _serve(
    function: Callable[[_Request], _Response], pipe: Connection, memory_bytes: int, parent: int
) -> None:
    """What the child does until its pipe is closed."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if memory_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    pipe.send(())
    while True:
        try:
            request = pipe.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            return  # nobody asks any more
        try:
            answer: tuple[_Response] | Exception = (function(request),)
        except Exception as error:  # it is raised again where the call came from
            answer = error
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return  # nobody wants it any more


def _end_with(parent: int) -> None:
    """A parent that was killed closes its end of the pipe, but a hung function does not look."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
