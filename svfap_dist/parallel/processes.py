"""Killable child processes, pools of them, and ordered maps over bounded work in flight.

In: a picklable function and requests. Out: its results, or `HungError` / `CrashedError`. A damaged
video can keep a decoder busy forever or bring it down, and Python can neither interrupt nor survive
either. So the parent kills a child that misses its deadline, and the next call starts another one.
Requests and results go through a pipe; large results belong in shared memory that the function
fills. The caller decides what follows from a failed call: a retry, a rejected sample, an error.

`ordered_map` calls a function ahead in threads, which may in turn call a `ProcessPool`, and yields
the results in the items' order, with at most a given number in flight, which bounds the memory.
`start_process` starts a process that is killed with its parent, for other protocols.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import queue
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from multiprocessing import util
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from svfap_dist.parallel import stacks

_START_SECONDS = 120.0  # for a child to start and to import what the function needs
_THREAD_COUNTS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_SECONDS_BETWEEN_CALLS = 1.0  # between calls of `on_wait`
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGINT))
_started: weakref.WeakSet[SpawnProcess] = weakref.WeakSet()
_starting = threading.Lock()  # a child inherits the environment, which all threads share
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class HungError(Exception):
    """The call missed its deadline; its process was killed."""


class CrashedError(Exception):
    """The process died during the call."""


class StartError(CrashedError):
    """The process of a `ChildProcess` died or hung before it ever served a call."""


class ChildProcess(Generic[_Request, _Response]):
    """Calls a function in a child process, one call at a time: use one instance per thread.

    The process is spawned, not forked: a child inherits no threads, no locks, no clients of stores.
    As a context manager, it ends the process on exit.

    Args:
        function: Picklable; called with each request. The caller gets the exceptions it raises.
        seconds: Deadline of a call; None: no deadline.
        memory_bytes: Address space that calls may use, on top of what the child has mapped once the
            function is imported (a CUDA build of torch maps gigabytes). Allocations beyond it fail;
            0: no limit. Ignored where the system has no such limits (Windows, macOS).
        may_have_children: Whether the function may start processes of its own.
        ignore_interrupts: Whether the child ignores Ctrl-C, which a terminal sends to parent and
            child alike, and what schedulers send to all processes of a job (SIGTERM, SIGUSR1); for
            parents that kill their children when they are interrupted.
        niceness: By how much the child's priority is below the parent's, 0 to 19.
        one_thread: Whether numeric libraries (OpenMP, OpenBLAS) use one thread in it, unless the
            environment says how many; for children that share the cores.
    """

    def __init__(
        self,
        function: Callable[[_Request], _Response],
        *,
        seconds: float | None,
        memory_bytes: int = 0,
        may_have_children: bool = False,
        ignore_interrupts: bool = False,
        niceness: int = 0,
        one_thread: bool = False,
    ) -> None:
        self._function, self._seconds = function, seconds
        self._may_have_children, self._one_thread = may_have_children, one_thread
        self._limits = _Limits(memory_bytes, niceness, ignore_interrupts, os.getpid())
        self._killed = self._has_served = False
        self._process: SpawnProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> ChildProcess[_Request, _Response]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, request: _Request, *, more_seconds: float = 0.0) -> _Response:
        """Return the function's result, starting the process if there is none.

        Args:
            request: Picklable argument of the function.
            more_seconds: Added to the deadline of this call.

        Raises:
            HungError: The call missed its deadline.
            CrashedError: The process died; StartError if none has ever started.
            Exception: Whatever the function raises.
        """
        if self._killed:
            raise CrashedError("it was killed")
        pipe = self._pipe or self._start()
        if self._killed:  # by another thread, while the process was starting
            raise CrashedError(self._end())
        try:
            pipe.send(request)
            seconds = None if self._seconds is None else self._seconds + more_seconds
            answer = self._receive(pipe, seconds)
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise CrashedError(self._end()) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer[0]

    def kill(self) -> None:
        """Kill the process for good, from any thread: this and later calls raise CrashedError."""
        self._killed = True
        if process := self._process:
            process.kill()

    def close(self) -> None:
        """Kill the process, if there is one; a later call starts another one."""
        self._end()

    def _start(self) -> Connection:
        self._process, self._pipe = start_process(
            _serve,
            (self._function, self._limits),
            may_have_children=self._may_have_children,
            ignore_signals=self._limits.ignore_interrupts,
            one_thread=self._one_thread,
        )
        try:
            self._receive(self._pipe, _START_SECONDS)
        except (EOFError, ConnectionResetError, HungError) as error:
            found = str(error) if isinstance(error, HungError) else self._end()
            raise (CrashedError if self._has_served else StartError)(found) from error
        self._has_served = True
        return self._pipe

    def _receive(self, pipe: Connection, seconds: float | None) -> tuple[_Response] | BaseException:
        if not pipe.poll(seconds):
            self._end()
            raise HungError(f"no answer after {seconds:g} s")
        return pipe.recv()

    def _end(self) -> str:
        """Kill the process if it is still running; return how it ended."""
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


class ProcessPool(Generic[_Request, _Response]):
    """Calls a function in one of several child processes; see `ChildProcess` for the arguments.

    The processes ignore Ctrl-C: a caller that is interrupted has to `kill` and `close` the pool.

    Args:
        function: Picklable; called with each request.
        processes: Largest number of processes, at least 1.
        seconds: Deadline of a call; None: no deadline.
        memory_bytes: Address space that calls in each child may use; 0: no limit.
        may_have_children: Whether the function may start processes of its own.
        niceness: By how much the children's priority is below the parent's, 0 to 19.
    """

    def __init__(
        self,
        function: Callable[[_Request], _Response],
        processes: int,
        *,
        seconds: float | None,
        memory_bytes: int = 0,
        may_have_children: bool = False,
        niceness: int = 0,
    ) -> None:
        self._children = [
            ChildProcess(
                function,
                seconds=seconds,
                memory_bytes=memory_bytes,
                may_have_children=may_have_children,
                ignore_interrupts=True,
                niceness=niceness,
                one_thread=True,
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
            request: Picklable argument of the function.
            more_seconds: Added to the deadline of this call.

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


@dataclasses.dataclass(frozen=True)
class _Limits:
    """How a child differs from its parent; see `ChildProcess`."""

    memory_bytes: int
    niceness: int
    ignore_interrupts: bool
    parent: int

    def apply(self) -> None:
        """Apply them to this process, whose imports are done."""
        if self.ignore_interrupts:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=exit_with_parent, args=(self.parent,), daemon=True).start()
        if self.niceness:
            os.nice(self.niceness)
        if self.memory_bytes:
            # Windows and macOS; a lower limit that the user has set.
            with contextlib.suppress(ImportError, OSError, ValueError):
                import resource

                with open("/proc/self/statm") as file:
                    mapped = int(file.read().split()[0]) * resource.getpagesize()
                limit = mapped + self.memory_bytes
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


@contextlib.contextmanager
def _one_library_thread() -> Iterator[None]:
    """Start children within this context whose numeric libraries use one thread each.

    OpenBLAS otherwise starts a thread per core, and maps memory for each, as NumPy is imported.
    """
    with _starting:
        added = [name for name in _THREAD_COUNTS if name not in os.environ]
        os.environ |= dict.fromkeys(added, "1")
        try:
            yield
        finally:
            for name in added:
                del os.environ[name]


def start_process(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    *,
    may_have_children: bool = False,
    ignore_signals: bool = True,
    one_thread: bool = True,
) -> tuple[SpawnProcess, Connection]:
    """Start a process and return it with this end of its pipe; it is killed if this one exits.

    Args:
        target: Function called in the process, with the arguments and its end of the pipe.
        arguments: Picklable.
        may_have_children: Whether it may start processes of its own.
        ignore_signals: Whether it ignores Ctrl-C and the signals by which schedulers stop a run,
            and its children do, too. They may be sent to all processes of a job.
        one_thread: See `ChildProcess`.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run, args=(target, *arguments, theirs), daemon=not may_have_children
    )
    with (
        _one_library_thread() if one_thread else contextlib.nullcontext(),
        _blocked_signals() if ignore_signals else contextlib.nullcontext(),
    ):
        process.start()
    theirs.close()
    _started.add(process)
    return process, ours


def _run(target: Callable[..., None], *arguments: Any) -> None:
    """Run the function of `start_process`; in the child."""
    stacks.allow_reading()
    target(*arguments)


def _kill_started() -> None:
    for process in list(_started):
        process.kill()


# At exit multiprocessing would wait for processes that ignore its signal or have children.
util.Finalize(None, _kill_started, exitpriority=10)


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Start children within this context that never see the signals which stop a run."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(function: Callable[[_Request], _Response], limits: _Limits, pipe: Connection) -> None:
    """Serve calls until the pipe is closed; runs in the child."""
    limits.apply()
    pipe.send(())
    while True:
        try:
            request = pipe.recv()
        except (EOFError, ConnectionResetError, KeyboardInterrupt):
            return  # the parent has closed its end
        try:
            answer: tuple[_Response] | Exception = (function(request),)
        except Exception as error:  # raised again in the caller
            answer = error
        try:
            pipe.send(answer)
        except BrokenPipeError:
            return


def exit_with_parent(parent: int) -> None:
    """Exit when the parent is gone: a hung function does not notice that the pipe was closed.

    Args:
        parent: Its number.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def in_flight(
    start: Callable[[_Item], _Result], items: Iterable[_Item], limit: int
) -> Generator[tuple[_Item, _Result]]:
    """Yield each item with what `start` returned for it, in order, `limit` items started at most.

    The item last yielded counts as in flight until the next one is requested, so `limit` buffers
    used in turn are enough: the n-th item may use buffer n % limit. Items are taken and started in
    the thread that iterates.

    Args:
        start: Starts the work on an item, without waiting for it, and returns a handle of it.
        items: Taken one by one, as the limit allows.
        limit: Items in flight, at least 1.
    """
    rest = iter(items)
    started: collections.deque[tuple[_Item, _Result]] = collections.deque()
    while True:
        for item in itertools.islice(rest, limit - len(started)):
            started.append((item, start(item)))
        if not started:
            return
        yield started.popleft()


def as_completed(
    start: Callable[[_Item], Future[_Result]],
    items: Iterable[_Item],
    limit: Callable[[], int],
    on_wait: Callable[[], Any] = lambda: None,
) -> Generator[tuple[_Item, Future[_Result]]]:
    """Yield each item with its finished future, in the order of completion.

    Unlike its namesake in `concurrent.futures`, it takes items only while few are in flight.

    Args:
        start: Starts the work on an item and returns its future.
        items: Taken one by one, as the limit allows.
        limit: Returns how many items may be in flight; called again after each completion.
        on_wait: Called once a second while none completes.
    """
    rest = iter(items)
    started: dict[Future[_Result], _Item] = {}
    while True:
        for item in itertools.islice(rest, max(limit() - len(started), 0)):
            started[start(item)] = item
        if not started:
            return
        done = wait(started, _SECONDS_BETWEEN_CALLS, FIRST_COMPLETED).done
        if not done:
            on_wait()
        for future in done:
            yield started.pop(future), future


def ordered_map(
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    *,
    threads: int,
    limit: int,
    in_order: bool = True,
    stop: Callable[[], Any] = lambda: None,
    on_wait: Callable[[], Any] = lambda: None,
) -> Generator[tuple[_Item, _Result]]:
    """Yield each item with the function's result, computed ahead by threads.

    An exception of the function is raised where its result would have been yielded. When the
    iteration ends early (by an exception or `close`), work that has not begun is canceled, and the
    threads are joined: none is left behind. Iterate under `contextlib.closing`.

    Args:
        function: Called with one item in one of the threads.
        items: Taken in the thread that iterates, as the limit allows.
        threads: Threads that call the function.
        limit: Items in flight at most, the one last yielded included.
        in_order: False: in the order of completion, so that a slow item holds up no other.
        stop: Called when the iteration ends early, before the threads are joined; ends the calls
            under way (`ProcessPool.kill`).
        on_wait: Called once a second while no item is completed, unless `in_order`.
    """
    executor = ThreadPoolExecutor(threads)

    def start(item: _Item) -> Future[_Result]:
        return executor.submit(function, item)

    is_done = False
    try:
        if in_order:
            started = in_flight(start, items, limit)
        else:
            started = as_completed(start, items, lambda: limit, on_wait)
        for item, future in started:
            yield item, future.result()
        is_done = True
    finally:
        if not is_done:
            stop()
        executor.shutdown(wait=True, cancel_futures=True)
