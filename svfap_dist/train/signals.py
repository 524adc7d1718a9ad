"""What asks a run to save a checkpoint before its time: signals, a time limit, nodes that leave.

Each rank hears for itself; what is done about it all ranks agree on at a step edge (`health`). Two
kinds of wishes come in:

- *Stop*: save and end. SIGTERM, SIGUSR1 (Slurm's warning before the time limit) and SIGINT
  (Ctrl-C), what the launcher passes on by other ways than signals, and `train.max_seconds`. The
  name of what was heard first becomes the run's stop reason, and `exit_code` says it to a shell or
  a scheduler.
- *Save*: a node will be taken away (Ray's preemption notice). The run saves and goes on, since the
  launcher restarts the ranks elsewhere when the node is gone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Set
from typing import Any

from svfap_dist.progress import say

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
FINISHED, TIME_IS_UP = "finished", "train.max_seconds"
# "Try again later" (sysexits.h): what a run ends with whose own time limit is over.
EX_TEMPFAIL = 75
_SECONDS_BETWEEN_LOOKS = 5.0  # for nodes that leave: all ranks look together

_listening: list[list[str]] = []  # what the outermost `heard_signals` has heard, while there is one

NodesLeaving = Callable[[], Set[str]]


def exit_code(stop_reason: str) -> int:
    """0 for a finished run, 128 + number for a signal's name, 75 for a time limit."""
    if stop_reason == FINISHED:
        return 0
    if stop_reason == TIME_IS_UP:
        return EX_TEMPFAIL
    return 128 + signal.Signals.__members__.get(stop_reason, signal.SIGINT)


@contextlib.contextmanager
def heard_signals() -> Iterator[Callable[[], str]]:
    """The name of the first signal heard that asks to stop, "" so far.

    A second one does what it did before. Signals are heard in the main thread only: elsewhere
    (Ray's workers) this hears nothing. Inside another one it hears what that has heard, so that a
    signal between two folds of a fine-tuning stops the next.
    """
    if _listening:
        outer = _listening[0]
        yield lambda: outer[0] if outer else ""
        return
    heard: list[str] = []
    before: dict[int, Any] = {}

    def hear(number: int, _: object) -> None:
        heard.append(signal.Signals(number).name)
        signal.signal(number, before[number])
        say("Stopping at the next step and saving a checkpoint; once more stops without one.")

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            before[number] = signal.signal(number, hear) or signal.SIG_DFL
        _listening.append(heard)
    try:
        yield lambda: heard[0] if heard else ""
    finally:
        _listening[:] = [other for other in _listening if other is not heard]
        for number, handler in before.items():
            signal.signal(number, handler)


class Notice:
    """What one rank has heard.

    Args:
        heard: name of a signal, or "".
        passed_on: what the launcher passes on by other ways, or "".
        nodes_leaving: names of the run's nodes that will be taken away; asked by all ranks
            together, about every five seconds. None where the launcher cannot know.
        max_seconds: from now on; 0: no limit.
    """

    def __init__(
        self,
        heard: Callable[[], str],
        passed_on: Callable[[], str],
        nodes_leaving: NodesLeaving | None,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._heard, self._passed_on, self._nodes_leaving = heard, passed_on, nodes_leaving
        self._clock = clock
        self._end = clock() + max_seconds if max_seconds else float("inf")
        self._next_look = clock()
        self._told: Set[str] = frozenset()

    def asked_to_stop(self) -> str:
        """What asks this rank from outside to stop, "" if nothing does."""
        return self._heard() or self._passed_on()

    def stop_reason(self) -> str:
        """The same, or that its own time is up."""
        return self.asked_to_stop() or (self._time_is_up() and TIME_IS_UP) or ""

    def _time_is_up(self) -> bool:
        return self._clock() >= self._end

    @property
    def wants_look(self) -> bool:
        """Whether it is time that all ranks look for nodes that leave."""
        return self._nodes_leaving is not None and self._clock() >= self._next_look

    def nodes_leave(self) -> bool:
        """Whether nodes will leave that were not told before; all ranks call it together."""
        if self._nodes_leaving is None:
            return False
        self._next_look = self._clock() + _SECONDS_BETWEEN_LOOKS
        found = self._nodes_leaving()
        is_news = not found <= self._told
        self._told = self._told | found
        return is_news
