"""Progress of long tasks on standard error: a bar on a terminal, else a line every few seconds.

Standard output stays free for results, which `--json` makes one object.
"""

from __future__ import annotations

import logging
import sys
import time

from svfap_dist import logs

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Progress of one task; a context manager.

    Args:
        title: What is done.
        total: Units of work; None: unknown.
        silent: Print nothing.
    """

    def __init__(self, title: str, total: int | None = None, silent: bool = False) -> None:
        self._title, self._total, self._silent = title, total, silent
        self._done, self._note = 0, ""
        self._began = time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES
        self._first: tuple[float, int] | None = None  # time and count of the first update
        self._bar = self._task = None
        if logs.allow_bars() and not silent:
            from rich import progress as bars
            from rich.console import Console

            columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn())
            ends = (bars.TimeRemainingColumn(), bars.TextColumn("{task.fields[note]}"))
            self._bar = bars.Progress(*columns, *ends, console=Console(stderr=True))
            self._task = self._bar.add_task(title, total=total, note="")

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
        elif not self._silent:
            say(f"{self._title} ...")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show how much is finished.

        Args:
            done: Finished units.
            total: Units of work, if known by now.
            note: Text for the end of the line.
        """
        self._total, self._done, self._note = total or self._total, done, note
        self._first = self._first or (time.monotonic(), done)
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=done, total=self._total, note=note)
        else:
            self.tick()

    def tick(self) -> None:
        """Print a line if one is due, though nothing new is finished."""
        if self._bar or self._silent or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
        if self._first is None:
            say(f"{self._title}: nothing done yet after {time.monotonic() - self._began:.0f} s")
            return
        share = f"{self._done} of {self._total}" if self._total else f"{self._done}"
        parts = (f"{self._title}: {share}", self._time_left(), self._note)
        say("  ".join(part for part in parts if part))

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
