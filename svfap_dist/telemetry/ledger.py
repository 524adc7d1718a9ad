"""Read the files of a run back in pieces: what its attempts did, and what each rank used.

In: events.jsonl and ledger/ of a run, as `journal` wrote them. Out: `PastAttempt`s, and each rank's
lines step by step. A file may be larger than memory, and a kill may have torn a line, which is
counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.telemetry.journal import EVENTS_FILE

_PIECE_BYTES = 1 << 20  # read at a time of a file
_TOTAL_BYTES = 64 << 20  # read at a time of all ledgers of an attempt together
_MIN_PIECE_BYTES = 1 << 16
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class PastAttempt:
    """One attempt.

    step: steps completed when it began. saved: step of its newest checkpoint; `step` if none.
    """

    number: int
    step: int
    saved: int
    manifest_fingerprint: str


def attempts(run_url: str) -> list[PastAttempt]:
    """Return the attempts that recorded their start, in order; others have saved nothing.

    Args:
        run_url: URL of the run.

    Raises:
        ConfigError: If there is none.
    """
    found: list[PastAttempt] = []
    for event in events(run_url):
        kind = event.get("event")
        if kind in ("start", "resume"):
            step, fingerprint = event["step"], event["manifest_fingerprint"]
            found.append(PastAttempt(event["attempt"], step, step, fingerprint))
        elif kind == "checkpoint" and found:
            found[-1] = dataclasses.replace(found[-1], saved=event["step"])
    if not found:
        where = storage.join(run_url, EVENTS_FILE)
        raise ConfigError(
            "Run has not begun", where=where, found="no start or resume", do="train it first"
        )
    return found


def events(run_url: str) -> Iterator[Line]:
    """Return the events of a run, in order; none if there is no such file.

    Args:
        run_url: URL of the run.
    """
    size = storage.list_files(run_url).get(EVENTS_FILE, 0)
    return iter(_Lines(storage.join(run_url, EVENTS_FILE), size, _PIECE_BYTES))


def ledgers(run_url: str, attempt: int, sizes: Mapping[str, int]) -> list[Ledger]:
    """Return the ledgers of an attempt's ranks.

    Args:
        run_url: URL of the run.
        attempt: Number of the attempt.
        sizes: Bytes of the files below ledger/, by name.
    """
    folder = f"attempt-{attempt:04d}/"
    names = [name for name in sizes if name.startswith(folder)]
    piece = min(_PIECE_BYTES, max(_TOTAL_BYTES // max(len(names), 1), _MIN_PIECE_BYTES))
    return [
        Ledger(_Lines(storage.join(run_url, "ledger", name), sizes[name], piece)) for name in names
    ]


class Ledger:
    """The lines of one rank of an attempt, read step by step.

    Args:
        lines: Of its file.
    """

    def __init__(self, lines: _Lines) -> None:
        self._lines, self._left = lines, iter(lines)
        self._next = self._read_next()

    def _read_next(self) -> Line | None:
        for line in self._left:
            if _is_whole(line):
                return line
            self._lines.torn += 1
        return None

    @property
    def torn(self) -> int:
        """Return the number of lines so far that could not be read."""
        return self._lines.torn

    def take(self, step: int) -> list[Line]:
        """Return lines of steps up to this one that were not taken before.

        Args:
            step: Number of the step, from 1.
        """
        taken = []
        while self._next is not None and self._next["step"] <= step:
            taken.append(self._next)
            self._next = self._read_next()
        return taken

    def last_step(self) -> int:
        """Read to the end and return the highest step found, 0 without any."""
        highest = 0
        while self._next is not None:
            highest = max(highest, self._next["step"])
            self._next = self._read_next()
        return highest


def _is_whole(line: Line) -> bool:
    wanted = {"step": int, "epoch": int, "lane": int, "key": str}
    return all(isinstance(line.get(name), kind) for name, kind in wanted.items())


class _Lines:
    """The JSON objects of a file of lines, read in pieces; unreadable ones are counted."""

    def __init__(self, url: str, size: int, piece_bytes: int) -> None:
        self._url, self._size, self._piece = url, size, piece_bytes
        self.torn = 0

    def __iter__(self) -> Iterator[Line]:
        rest = b""
        for start in range(0, self._size, self._piece):
            data = storage.read_range(self._url, start, min(start + self._piece, self._size))
            *whole, rest = (rest + data).split(b"\n")
            for text in whole:
                line = _parsed(text)
                if line is None:
                    self.torn += 1
                else:
                    yield line
        self.torn += bool(rest)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) else None
