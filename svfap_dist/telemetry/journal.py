"""The files of a run, written so that a kill at any instant loses only the last lines.

Under `run.url`: config.toml (resolved recipe) · metrics.jsonl (a line per log step) · events.jsonl
(start, resume, change, resize, ready, first_step, window, checkpoint, checkpoint_failed, eval,
validation, probe, probe_failed, profile, test, skip, spike, rollback, stall, stop; see `goodput`) ·
quarantine.jsonl (samples that could not be used) · ledger/attempt-0001/rank-0000.jsonl (a line per
sample used, if run.ledger is set; its further parts are rank-0000.0001.jsonl, ...0002, and so on),
failures/rank-0001.json (the last error of a rank other than 0; those of rank 0 are stop events).

Rank 0 writes the first four, every rank its own ledger and failure. A local file grows by appended
lines. An object store cannot append, so there a local copy grows and is uploaded whole: every half
minute, at each checkpoint before its COMMIT, and at the end. A ledger grows by the size of a key
with every sample, so it is in parts: one that has reached its size is uploaded once more and never
again.

A killed attempt may leave lines of steps after the one that the next attempt resumes from. In
metrics and quarantine the resume drops them, and a torn last line. Ledgers are never changed: every
attempt (start or resume) has its own folder, its event names the `step` it continued from, and a
ledger line counts only if its step is at most that of every later attempt. So the count stays exact
when the number of ranks changes from one attempt to the next.

The second half of this file reads events and ledgers back in pieces, since they may be larger than
memory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from svfap_dist import json_text, storage
from svfap_dist.config import Config, recipe
from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.telemetry.goodput import BEGINNINGS

RECIPE_FILE, METRICS_FILE = "config.toml", "metrics.jsonl"
EVENTS_FILE, QUARANTINE_FILE = "events.jsonl", "quarantine.jsonl"
STALLS_FOLDER, STALL_FILE = "stalls", "stall.json"  # written by the watchdog, not by a `Journal`
STARTING = "starting"  # prefix of the folders of stalls before their attempt has begun
FAILURES_FOLDER = "failures"
UPLOAD_EVERY_SECONDS = 30.0
_STOPPED_BY_HEALTH = ("NotFiniteError", "HealthError")  # reasons of stop events
_PART_BYTES = 16 << 20  # of a ledger, after which the next part begins
_PART_NAME = re.compile(r"rank-(\d+)(?:\.(\d+))?\.jsonl")
_PIECE_BYTES = 1 << 20  # read at a time of a file
_TOTAL_BYTES = 64 << 20  # read at a time of all ledgers of an attempt together
_MIN_PIECE_BYTES = 1 << 16
_PARALLEL_READS = 32

log = logging.getLogger(__name__)
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """What earlier attempts left.

    fingerprints: of the manifests of the last one that began. passed_over: steps without an update,
    since a rollback. rollbacks: those since the last checkpoint that is beyond their steps; a run
    that was stopped by its health begins to count again. failures: (completed steps, error) of all
    attempts on rank 0, and of the last failure of each other rank.
    """

    attempts: int  # highest number of an attempt that left a trace
    fingerprints: frozenset[str] = frozenset()
    passed_over: frozenset[int] = frozenset()
    rollbacks: int = 0
    failures: frozenset[tuple[int, str]] = frozenset()


def attempt_folder(attempt: int) -> str:
    """Return the name of an attempt's folder in ledger/ and stalls/.

    Args:
        attempt: Its number, from 1.
    """
    return f"attempt-{attempt:04d}"


def read_history(run_url: str) -> RunHistory:
    """Return what earlier attempts at a run left.

    Args:
        run_url: URL of the run.
    """
    events = _complete_lines(_read(storage.join(run_url, EVENTS_FILE)))
    began = [line for line in events if line["event"] in BEGINNINGS]
    folders = storage.list_folders(storage.join(run_url, "ledger"))
    numbers = [int(m[1]) for name in folders if (m := re.fullmatch(r"attempt-(\d+)", name))]
    last = began[-1] if began else {}
    names = ("manifest_fingerprint", "eval_fingerprint")
    passed_over: set[int] = set()
    failures = set(_read_failures(run_url) if began else ())
    rollbacks = 0
    for line in events:
        if line["event"] == "rollback":
            passed_over.update(line["passed_over"])
            rollbacks += 1
        elif line["event"] == "checkpoint" and line["step"] > max(passed_over, default=0):
            rollbacks = 0
        elif line["event"] == "stop" and line.get("message"):
            error = f"{line['reason']}: {line['message']}".partition("\n")[0]
            failures.add((line["step"], error))
            rollbacks = 0 if line["reason"] in _STOPPED_BY_HEALTH else rollbacks
    return RunHistory(
        attempts=max([0, *(line["attempt"] for line in began), *numbers]),
        fingerprints=frozenset(last[name] for name in names if last.get(name)),
        passed_over=frozenset(passed_over),
        rollbacks=rollbacks,
        failures=frozenset(failures),
    )


def write_failure(run_url: str, rank: int, step: int, failure: str) -> None:
    """Store the error that ends a rank, in place of its last one.

    Args:
        run_url: URL of the run.
        rank: Number of the rank.
        step: Completed optimizer steps.
        failure: The error as one line.

    Raises:
        StorageError: It cannot be written.
    """
    url = storage.join(run_url, FAILURES_FOLDER, f"rank-{rank:04d}.json")
    storage.write_bytes(url, json.dumps({"step": step, "failure": failure}).encode())


def _read_failures(run_url: str) -> list[tuple[int, str]]:
    """Return (completed steps, error) of the last failure of each rank but 0."""
    folder = storage.join(run_url, FAILURES_FOLDER)
    urls = [storage.join(folder, name) for name in storage.list_files(folder)]
    with ThreadPoolExecutor(_PARALLEL_READS, thread_name_prefix="failures") as pool:
        found = [_parsed(data) or {} for data in pool.map(storage.read_bytes, urls)]
    pairs = [(each.get("step"), each.get("failure")) for each in found]
    return [
        (step, failure)
        for step, failure in pairs
        if isinstance(step, int) and isinstance(failure, str)
    ]


def read_recipe(run_url: str) -> Config:
    """Return the recipe of a run's latest attempt.

    Args:
        run_url: URL of the run.

    Raises:
        ConfigError: If there is no run.
    """
    where = storage.join(run_url, RECIPE_FILE)
    try:
        text = storage.read_bytes(where).decode()
    except storage.StorageMissingError as error:
        do = "give the run.url of a run"
        raise ConfigError("No run at this URL", where, "no such file", do) from error
    return recipe.from_stored(tomllib.loads(text), where=where)


class Journal:
    """Writes this rank's share of the files of a run; a context manager.

    Args:
        config: The run's recipe.
        rank: Number of this rank.
        attempt: Number of the attempt, from 1, agreed by all ranks.
        step: Completed steps that the attempt continues from; later lines are dropped.
        clock: Seconds since the epoch, for tests.
        on_line: Called with the file's name and each line of rank 0's files.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        attempt: int,
        step: int,
        clock: Callable[[], float] = time.time,
        on_line: Callable[[str, Line], None] = lambda name, line: None,
    ) -> None:
        self._clock, self._on_line = clock, on_line
        url = config.run.url
        self._files: dict[str, _LineFile] = {}
        if rank == 0:
            storage.write_bytes(storage.join(url, RECIPE_FILE), recipe.dumps(config).encode())
            for name in (METRICS_FILE, QUARANTINE_FILE):
                self._files[name] = _LineFile(storage.join(url, name), until_step=step)
            self._files[EVENTS_FILE] = _LineFile(storage.join(url, EVENTS_FILE))
        self._ledger: _Ledger | None = None
        if config.run.ledger:
            name = f"ledger/{attempt_folder(attempt)}/rank-{rank:04d}"
            self._ledger = _Ledger(storage.join(url, name))
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        if storage.is_remote(url):
            self._thread = threading.Thread(target=self._upload_periodically, daemon=True)
            self._thread.start()

    def write_event(self, event: str, **fields: Any) -> Line:
        """Write an event with its time (rank 0; others write nothing), and return its line.

        Args:
            event: Kind of the event.
            **fields: Further fields of its line.
        """
        line = {"event": event, "time": self._clock(), **fields}
        self.write_line(EVENTS_FILE, line)
        return line

    def write_line(self, name: str, line: Line) -> None:
        """Append a line to one of rank 0's files; other ranks do nothing.

        Args:
            name: METRICS_FILE, QUARANTINE_FILE or EVENTS_FILE.
            line: Its fields.
        """
        if name in self._files:
            self._files[name].append(encode_lines([line]))
            self._on_line(name, line)

    def write_ledger(self, lines: bytes) -> None:
        """Write the samples this rank used in a step, if run.ledger is set.

        Args:
            lines: One line per sample, as `encode_lines` returns them.
        """
        if self._ledger is not None:
            self._ledger.append(lines)

    def read_lines(self, name: str) -> list[Line]:
        """Return all lines of one of rank 0's files, over all attempts.

        Args:
            name: Name of the file.
        """
        return self._files[name].lines()

    def sync(self) -> None:
        """Store everything written so far, so that a kill of this process cannot lose it."""
        for file in self._open_files():
            file.sync()

    def _open_files(self) -> list[_LineFile | _Ledger]:
        return [*self._files.values(), *([self._ledger] if self._ledger else [])]

    def _upload_periodically(self) -> None:
        while not self._closing.wait(UPLOAD_EVERY_SECONDS):
            try:
                self.sync()
            except StorageError as error:
                log.warning("Files of the run not uploaded, will try again: %s", error)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        try:
            self.sync()
        except StorageError as error:
            log.warning("The last lines of the run's files are lost: %s", error)
        for file in self._open_files():
            file.close()


class _LineFile:
    """A file of JSON lines that grows locally and is uploaded whole to an object store."""

    def __init__(self, url: str, until_step: int | None = None, is_new: bool = False) -> None:
        self._url = url
        self._lock = threading.Lock()  # of the local file
        self._uploading = threading.Lock()  # so that an older copy never replaces a newer one
        self._folder = tempfile.TemporaryDirectory() if storage.is_remote(url) else None
        self._path = (
            os.path.join(self._folder.name, "lines") if self._folder else storage.local_path(url)
        )
        found = b"" if is_new else _read(url)
        kept = [
            line
            for line in _complete_lines(found)
            if until_step is None or line.get("step", 0) <= until_step
        ]
        data = encode_lines(kept)
        storage.write_bytes(self._path, data)
        self._unsaved = data != found
        self._file = open(self._path, "ab")  # noqa: SIM115 - closed by close()

    def append(self, data: bytes) -> None:
        with self._lock:
            self._file.write(data)
            self._file.flush()
            self._unsaved = True

    def lines(self) -> list[Line]:
        with self._lock:
            return _complete_lines(storage.read_bytes(self._path))

    def sync(self) -> None:
        with self._uploading:
            with self._lock:
                if not self._unsaved:
                    return
                os.fsync(self._file.fileno())
                data = storage.read_bytes(self._path) if self._folder else b""
                self._unsaved = False
            if self._folder:
                try:
                    storage.write_bytes(self._url, data)
                except StorageError:
                    self._unsaved = True
                    raise

    def close(self) -> None:
        self._file.close()
        if self._folder:
            self._folder.cleanup()


class _Ledger:
    """A rank's ledger of an attempt: a line file at a time, until it has reached its size."""

    def __init__(self, stem: str) -> None:
        self._stem, self._number, self._written = stem, 0, 0
        self._lock = threading.Lock()  # of the list
        self._parts = [_LineFile(f"{stem}.jsonl")]  # unsaved ones; lines go to the last

    def append(self, data: bytes) -> None:
        if self._written >= _PART_BYTES:
            self._number, self._written = self._number + 1, 0
            part = _LineFile(f"{self._stem}.{self._number:04d}.jsonl", is_new=True)
            with self._lock:
                self._parts.append(part)
        self._written += len(data)
        self._parts[-1].append(data)

    def sync(self) -> None:
        with self._lock:
            parts = list(self._parts)
        for part in parts:
            part.sync()
        with self._lock:
            self._parts = [part for part in self._parts if part not in parts[:-1]]
        for part in parts[:-1]:
            part.close()

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _read(url: str) -> bytes:
    try:
        return storage.read_bytes(url)
    except storage.StorageMissingError:
        return b""


def encode_lines(lines: Iterable[Line]) -> bytes:
    """Return lines as the bytes of a file.

    Args:
        lines: Fields of each line.
    """
    return b"".join(json_text.dumps(line).encode() + b"\n" for line in lines)


def _complete_lines(data: bytes) -> list[Line]:
    """Parse the complete lines; a torn last one is left out."""
    lines = []
    for text in data.split(b"\n")[:-1]:
        try:
            lines.append(json.loads(text))
        except ValueError:
            log.warning("Skipped an unreadable line of a run's file: %r", text[:80])
    return lines


@dataclasses.dataclass(frozen=True)
class PastAttempt:
    """An attempt at a run, from its events.

    step: steps completed when it began. saved: step of its newest checkpoint; `step` if none.
    passed_over: steps that it does not compute. skipped: steps whose update it left out.
    """

    number: int
    step: int
    saved: int
    manifest_fingerprint: str
    passed_over: frozenset[int] = frozenset()
    skipped: frozenset[int] = frozenset()


def read_attempts(run_url: str) -> list[PastAttempt]:
    """Return the attempts that recorded their start, in order; others have saved nothing.

    Args:
        run_url: URL of the run.

    Raises:
        ConfigError: If there is none.
    """
    found: list[PastAttempt] = []
    passed_over: frozenset[int] = frozenset()
    for event in read_events(run_url):
        kind = event.get("event")
        if kind in BEGINNINGS:
            step, fingerprint = event["step"], event["manifest_fingerprint"]
            found.append(PastAttempt(event["attempt"], step, step, fingerprint, passed_over))
        elif kind == "checkpoint" and found:
            found[-1] = dataclasses.replace(found[-1], saved=event["step"])
        elif kind == "skip" and found:
            skipped = found[-1].skipped | {event["step"]}
            found[-1] = dataclasses.replace(found[-1], skipped=skipped)
        elif kind == "rollback":
            passed_over |= set(event["passed_over"])
    if not found:
        where = storage.join(run_url, EVENTS_FILE)
        raise ConfigError("Run has not begun", where, "no start or resume", "train it first")
    return found


def read_events(run_url: str) -> Iterator[Line]:
    """Return the events of a run, in order; none if there is no such file.

    Args:
        run_url: URL of the run.
    """
    size = storage.list_files(run_url).get(EVENTS_FILE, 0)
    return iter(_Lines({storage.join(run_url, EVENTS_FILE): size}, _PIECE_BYTES))


def read_ledgers(run_url: str, attempt: int, sizes: Mapping[str, int]) -> list[Ledger]:
    """Return the ledgers of an attempt's ranks, in order of their number.

    Args:
        run_url: URL of the run.
        attempt: Number of the attempt.
        sizes: Bytes of the files below ledger/, by name.
    """
    folder = attempt_folder(attempt)
    parts: dict[int, dict[int, str]] = {}  # names, by rank and number of the part
    for name in sizes:
        if match := _PART_NAME.fullmatch(name.removeprefix(f"{folder}/")):
            parts.setdefault(int(match[1]), {})[int(match[2] or 0)] = name
    piece = min(_PIECE_BYTES, max(_TOTAL_BYTES // max(len(parts), 1), _MIN_PIECE_BYTES))
    ledgers = []
    for _, of_rank in sorted(parts.items()):
        names = [name for _, name in sorted(of_rank.items())]
        files = {storage.join(run_url, "ledger", name): sizes[name] for name in names}
        ledgers.append(Ledger(_Lines(files, piece)))
    return ledgers


class Ledger:
    """The lines of one rank of an attempt, read step by step.

    Args:
        lines: Lines of its parts.
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
        """Return the lines of steps up to this one that no earlier call returned.

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
    has_source = isinstance(line.get("source", 0), int)  # only lines of a mixture have one
    return has_source and all(isinstance(line.get(name), kind) for name, kind in wanted.items())


class _Lines:
    """The JSON objects of files of lines, read in pieces; unreadable ones are counted."""

    def __init__(self, sizes: Mapping[str, int], piece_bytes: int) -> None:
        self._sizes, self._piece = sizes, piece_bytes  # bytes of the files, by URL
        self.torn = 0

    def __iter__(self) -> Iterator[Line]:
        for url, size in self._sizes.items():
            rest = b""
            for start in range(0, size, self._piece):
                data = storage.read_range(url, start, min(start + self._piece, size))
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
