"""Python stacks of this process and of the processes it started, also while they hang.

A child registers a signal handler in C (`faulthandler`), which needs neither the interpreter's lock
nor its main thread, and writes to an unnamed file in memory. `stacks_of_children` sends the signal
to all descendants and reads that file by /proc, so nothing is left on disk. `frames` finds in such
a text where a thread is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import os
import re
import signal
import tempfile
import threading
import time

_FILE = "svfap-stacks"
_SECONDS = 1.0  # for all children to write
_POLL_SECONDS = 0.02
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x([0-9a-f]+)")
_NO_ANSWER = "no answer: it is stopped"
_STOPPED = re.compile(rf"^Process (\d+), .*:\n{_NO_ANSWER}$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$')


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call in a thread's stack. thread: its ident."""

    thread: int
    path: str
    line: int
    function: str

    def __str__(self) -> str:
        name = self.path.rpartition("svfap_dist/")[2] if "svfap_dist/" in self.path else self.path
        return f"{name}:{self.line} {self.function}"


def allow_reading() -> None:
    """Write this process's stacks at SIGUSR2, for `stacks_of_children` of its parent."""
    if not hasattr(os, "memfd_create"):  # not Linux
        return
    file = os.fdopen(os.memfd_create(_FILE), "w")
    faulthandler.register(signal.SIGUSR2, file=file, all_threads=True)


def own_stacks() -> str:
    """Return the stacks of all threads of this process, and the names of the threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        text = file.read()
    names = [f"0x{t.ident:016x} {t.name}" for t in threading.enumerate() if t.ident]
    return text + "\nThreads by name:\n" + "\n".join(names) + "\n"


def stacks_of_children() -> str:
    """Return the stacks of all descendants that called `allow_reading`."""
    files = {}
    for pid in _descendants(os.getpid()):
        if path := _file_of(pid):
            with contextlib.suppress(OSError):
                files[pid] = path, os.stat(path).st_size
                os.kill(pid, signal.SIGUSR2)
    time.sleep(_POLL_SECONDS)
    texts, deadline = [], time.monotonic() + _SECONDS
    for pid, (path, before) in files.items():
        text, size = "", before
        with contextlib.suppress(OSError):  # it has ended
            while time.monotonic() < deadline:
                last, size = size, os.stat(path).st_size
                if size == last > before:
                    break
                time.sleep(_POLL_SECONDS)
            with open(path) as file:
                file.seek(before)
                text = file.read()
        name = _command(pid)
        texts.append(f"Process {pid}, {name}:\n{text or _NO_ANSWER}\n")
    return "\n".join(texts)


def state_of(pid: int) -> str:
    """Return the state letter of a process of this host (R, S, D, T, Z, ...), "" without one.

    Args:
        pid: Its number.
    """
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def frames(text: str) -> list[Frame]:
    """Return the innermost frame in this package of each thread, in the order of the text.

    Args:
        text: Stacks as `own_stacks` and `stacks_of_children` return them.
    """
    found: list[Frame] = []
    thread = 0
    for line in text.splitlines():
        if match := _THREAD.match(line):
            thread = int(match[1], 16)
        elif (match := _FRAME.match(line)) and "svfap_dist/" in match[1]:
            if thread:
                found.append(Frame(thread, match[1], int(match[2]), match[3]))
            thread = 0  # the frames after it are its callers
    return found


def stopped_children(text: str) -> list[int]:
    """Return the numbers of the processes that did not write their stacks.

    Args:
        text: From `stacks_of_children`.
    """
    return [int(number) for number in _STOPPED.findall(text)]


def _descendants(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *_descendants(child)]
    return found


def _file_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{name}"
            with contextlib.suppress(OSError):
                if os.readlink(path).startswith(f"/memfd:{_FILE}"):
                    return path
    return ""


def _command(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as file:
        return file.read().strip()
    return "ended"
