"""Decide from the heartbeats of all ranks whether a run has stalled, and which rank is behind.

In: the last `Beat` of each rank and for how long it has not changed. Out: a `Verdict` or None, and
the error that names rank and place. Pure functions: threads, clocks and the store are in
`watchdog`.

A rank that is stopped, hung in C code or cut off sends no beats. One that hangs elsewhere still
does, and so do those that wait for it: then the number of collectives that each has begun shows who
is behind.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Literal

from svfap_dist.errors import ClusterError

Kind = Literal["silent", "behind", "together", "store"]


class StallError(ClusterError):
    """A run without progress; the launcher restarts its ranks."""


@dataclasses.dataclass(frozen=True)
class Beat:
    """State of a rank, as it says itself.

    collectives: begun so far. seconds: since that number or the activity changed. limit: seconds
    that this may take. ended: the rank has left the run.
    """

    host: str
    pid: int
    number: int
    step: int
    activity: str
    seconds: float
    limit: float
    collectives: int
    ended: bool = False

    def dumps(self) -> str:
        """Return it as text."""
        return json.dumps(dataclasses.astuple(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Beat:
        """Return the beat of a text.

        Args:
            text: From `dumps`.
        """
        return cls(*json.loads(text))

    @property
    def doing(self) -> str:
        """Return the activity and its step in words."""
        return f"{self.activity} of step {self.step}" if self.step else self.activity


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Why a run counts as stalled. ranks: that are behind; all of them for "together"."""

    kind: Kind
    ranks: tuple[int, ...]
    seconds: float  # without progress

    def dumps(self) -> str:
        """Return it as text."""
        return json.dumps([self.kind, self.ranks, self.seconds])

    @classmethod
    def loads(cls, text: str | bytes) -> Verdict:
        """Return the verdict of a text.

        Args:
            text: From `dumps`.
        """
        kind, ranks, seconds = json.loads(text)
        return cls(kind, tuple(ranks), seconds)


def judge(
    beats: Mapping[int, Beat], silences: Mapping[int, float], stall_seconds: float
) -> Verdict | None:
    """Return why the run has stalled, or None while it has not.

    Args:
        beats: The newest beat of each rank.
        silences: Seconds since the beat of each rank changed last.
        stall_seconds: Silence after which a rank counts as stopped.
    """
    here = [rank for rank, beat in beats.items() if not beat.ended]
    silent = [rank for rank in here if silences[rank] > stall_seconds]
    if silent:
        return Verdict("silent", tuple(silent), max(silences[rank] for rank in silent))
    # Others may wait in a short activity for one that is in a long one.
    limit = max((beats[rank].limit for rank in here), default=0.0)
    seconds = max((beats[rank].seconds for rank in here), default=0.0)
    if not here or seconds <= limit:
        return None
    fewest = min(beat.collectives for beat in beats.values())
    behind = [rank for rank, beat in beats.items() if beat.collectives == fewest]
    if len(behind) == len(beats):
        return Verdict("together", tuple(behind), seconds)
    # Others may notice the wait for a stopped rank just before its silence is long enough.
    is_silent = all(silences[rank] > stall_seconds / 2 and rank in here for rank in behind)
    return Verdict("silent" if is_silent else "behind", tuple(behind), seconds)


def explain(
    verdict: Verdict,
    beats: Mapping[int, Beat],
    places: Mapping[int, str],
    state: str,
    folder: str,
) -> StallError:
    """Return the error that names the ranks, what they do, and where in the code.

    Args:
        verdict: From `judge`.
        beats: The newest beat of each rank.
        places: Where each rank that answered is in the code.
        state: What is known of the process of a silent rank, "" if nothing.
        folder: URL of the stacks.
    """
    first = verdict.ranks[0]
    beat = beats.get(first)
    who = _who(verdict.ranks, beat)
    steps = [each.step for each in beats.values()]
    where = f"step {beat.step if beat and beat.step else max(steps, default=0)}, {who}"
    at = f", at {places[first]}" if first in places else ""
    doing = f"{beat.doing}{at}" if beat else f"an unknown activity{at}"
    if verdict.kind == "silent":
        found = f"no heartbeat: {state or 'the process is stopped, or its host is cut off'}; "
        found += f"last seen {doing}"
    elif verdict.kind == "store":
        found = "the process group's rendezvous store does not answer: "
        found += state or "its host is stopped or cut off"
    elif verdict.kind == "behind" and beat is not None and beat.ended:
        found = "it has left the run, and the others wait for it"
    elif verdict.kind == "behind":
        found = f"{doing}; it has begun {beat.collectives if beat else 0} collectives, the other "
        found += f"ranks up to {max(each.collectives for each in beats.values())}"
    else:
        found = doing if len(beats) == 1 else f"every rank has begun the same collectives: {doing}"
    found += f"; no progress for {verdict.seconds:.0f} s"
    do = f"see the stacks of all ranks in {folder}; the run resumes from its newest checkpoint; "
    do += "raise train.stall_seconds if this can take longer"
    return StallError("Training has stalled", where, found, do)


def _who(ranks: Sequence[int], first: Beat | None) -> str:
    if len(ranks) > 1:
        named = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
        return f"ranks {named}"
    return f"rank {ranks[0]}" + (f" (process {first.pid} on {first.host})" if first else "")
