"""Progress of long tasks on standard error: a bar on a terminal, else a line every few seconds.

A background thread prints a line even if there is no progress, so that no wait is silent. Standard
output is left to results.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any

from svfap_dist import logs

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_BETWEEN_TICKS = 1.0
_entered: list[Progress] = []  # nested tasks; only the innermost, the last one, is shown


class Progress:
    """Progress of one task; a context manager.

    Args:
        title: What is done.
        total: Units of work; None: unknown.
        silent: Print nothing.
        announce: Print a line, or a bar, at once; False: the task is usually short, so the first
            line is due after ten seconds, and a terminal shows a spinner until the end.
    """

    def __init__(
        self, title: str, total: int | None = None, silent: bool = False, announce: bool = True
    ) -> None:
        self._title, self._total, self._silent = title, total, silent
        self._announce = announce
        self._done, self._note = 0, ""
        self._began = self._latest = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._first: tuple[float, int] | None = None  # time and count of the first update
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._bar = self._task = None
        if logs.allow_bars() and not silent:
            self._bar = _bar(announce)
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        if self._silent:
            return self
        if _entered and (outer := _entered[-1]._bar):
            outer.stop()
        _entered.append(self)
        if self._bar:
            self._bar.start()
        else:
            if self._announce:
                say(f"{self._title} ...")
            self._ticker = threading.Thread(target=self._tick_until_end, daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._silent:
            return
        if self._bar:
            self._bar.stop()
        if self._ticker:
            self._ended.set()
            self._ticker.join()
        _entered.remove(self)
        if _entered and (outer := _entered[-1]._bar):
            outer.start()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show how much is finished.

        Args:
            done: Finished units.
            total: Units of work, if known by now.
            note: Text for the end of the line.
        """
        with self._lock:
            if self._first is None or done != self._done:
                self._latest = time.monotonic()
            self._total, self._done, self._note = total or self._total, done, note
            self._first = self._first or (self._latest, done)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        else:
            self.tick()

    def tick(self) -> None:
        """Print a line if one is due, even without progress."""
        if self._bar or self._silent:
            return
        with self._lock:
            now = time.monotonic()
            if now < self._next_line:
                return
            self._next_line = now + _SECONDS_BETWEEN_LINES
            if _entered[-1:] == [self]:
                say(self._line(now))

    def _line(self, now: float) -> str:
        if self._first is None:
            done_yet = "nothing done yet after " if self._announce else ""
            return f"{self._title}: {done_yet}{now - self._began:.0f} s"
        share = f"{self._done} of {self._total}" if self._total else f"{self._done}"
        idle = now - self._latest
        # After the last unit: a test, a checkpoint's upload, pictures.
        what = "finishing" if self._done == self._total else "nothing new"
        waits = f"{what} for {idle:.0f} s" if idle >= _SECONDS_BETWEEN_LINES else ""
        parts = (f"{self._title}: {share}", waits or self._time_left(), self._note)
        return "  ".join(part for part in parts if part)

    def _tick_until_end(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_TICKS):
            self.tick()

    def _time_left(self) -> str:
        """Return the time left at the speed since the first update, or an empty string."""
        if self._first is None or not self._total:
            return ""
        since, done_then = self._first
        done = self._done - done_then
        if done <= 0:
            return ""
        left = round((self._total - self._done) * (time.monotonic() - since) / done)
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"


def _bar(has_count: bool) -> Any:
    """Return a bar for a terminal, or a spinner that vanishes at the end; rich obeys NO_COLOR."""
    from rich import progress as bars
    from rich.console import Console

    # Do not redirect standard output, which may be a file, to the bar's console.
    settings: Any = {"console": Console(stderr=True), "redirect_stdout": False}
    elapsed = bars.TimeElapsedColumn()  # moves even without progress
    if not has_count:
        columns = (bars.SpinnerColumn(), "{task.description}", elapsed)
        return bars.Progress(*columns, transient=True, **settings)
    columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), elapsed)
    ends = (bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[note]}"))
    return bars.Progress(*columns, *ends, **settings)


def waiting(title: str, silent: bool = False) -> Progress:
    """Return the progress of a task without a count that usually ends within seconds.

    Args:
        title: What is done.
        silent: Print nothing.
    """
    return Progress(title, silent=silent, announce=False)


def say(line: str) -> None:
    """Log a line at level info, or print it where no log is set up.

    Args:
        line: The text.
    """
    log = logging.getLogger("svfap_dist")
    if log.handlers:
        log.info(line)
    else:
        print(line, file=sys.stderr, flush=True)
