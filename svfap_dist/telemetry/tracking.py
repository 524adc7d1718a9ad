"""Send what the recorder records to the trackers of the recipe's [track], from rank 0.

In: lines of metrics.jsonl and events.jsonl, as the journal writes them, and pictures. Each tracker
has a thread and a bounded queue of its own, so a tracker that fails or hangs costs a warning, never
a step: what does not fit into the queue is left out, and a call that fails is retried after a
while. A call that never succeeds is left out; if the one after it fails, too, the tracker is off
until the next attempt. The reference to the tracked run is kept in the run's folder,
track/NAME.json, so a resumed run continues it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from svfap_dist import storage
from svfap_dist.config import Config, TrackConfig, recipe
from svfap_dist.errors import ConfigError
from svfap_dist.telemetry.goodput import BEGINNINGS
from svfap_dist.telemetry.journal import EVENTS_FILE, METRICS_FILE, Line
from svfap_dist.telemetry.trackers import (
    TRACKERS,
    Reference,
    TrackedRun,
    Tracker,
    check_wandb_key,
)

log = logging.getLogger(__name__)

_MAX_WAITING = 2000  # calls of a tracker
_WAITS = (2.0, 8.0, 32.0, 128.0)  # seconds after failures of a call; one more is its last
_CLOSE_SECONDS = 30.0  # for all trackers together
_EVENTS = ("eval", "probe", "validation", "checkpoint", "test")  # whose numbers are tracked
_NOT_SCALARS = ("step", "total_steps", "time")

Call = Callable[[Tracker], None]


def chosen_trackers(track: TrackConfig) -> list[str]:
    """Return the names of the trackers that a recipe wants.

    Args:
        track: The recipe's section.
    """
    return [name for name in TRACKERS if getattr(track, name)]


def check_installed(track: TrackConfig) -> None:
    """Check that the packages of the trackers are installed; warn if W&B would need a key.

    Args:
        track: The recipe's section.

    Raises:
        ConfigError: If one is missing.
    """
    for name in chosen_trackers(track):
        kind: Any = TRACKERS[name]
        if importlib.util.find_spec(kind.module) is None:
            advice = f"pip install 'svfap-dist[{kind.extra}]', or leave out track.{name}"
            found = f"{kind.module} is not installed"
            raise ConfigError("Missing optional dependency", f"track.{name}", found, advice)
    if track.wandb:
        try:
            check_wandb_key()
        except ConfigError as error:  # the machine of rank 0, if it is another, may have one
            log.warning("%s", error, extra={"once": True})


class Tracking:
    """The trackers of a run, of one attempt; a context manager.

    Args:
        config: The run's recipe.
        step: Completed steps that the attempt continues from.
    """

    def __init__(self, config: Config, step: int) -> None:
        self._url, self._failed = config.run.url, False
        track = config.track
        sections = config.model_dump(mode="json", exclude_none=True)
        run = TrackedRun(config.run.name, self._url, recipe.dumps(config), sections, step)
        self._feeds = {
            name: _Feed(name, TRACKERS[name](track), functools.partial(self._open, name, run))
            for name in chosen_trackers(track)
        }
        self._put(lambda tracker: tracker.write_recipe(run))

    def _open(self, name: str, run: TrackedRun, tracker: Tracker) -> None:
        """Open a tracker and keep what finds the tracked run again (in its thread)."""
        where = storage.join(self._url, "track", f"{name}.json")
        try:
            reference: Reference = json.loads(storage.read_bytes(where))
        except storage.StorageMissingError:
            reference = {}
        try:
            reference = tracker.open(dataclasses.replace(run, reference=reference))
        except Exception as error:
            if reference:
                error.add_note(f"If its run was deleted there, delete {where} to begin another.")
            raise
        storage.write_bytes(where, json.dumps(reference).encode())
        if reference.get("url"):
            log.info("Tracked by %s: %s", name, reference["url"])

    def write_line(self, name: str, line: Line) -> None:
        """Send the numbers and facts of a line.

        Args:
            name: Of the run's file that it is written to.
            line: Its fields.
        """
        if name == EVENTS_FILE and line["event"] == "stop":
            self._failed = bool(line["message"])
        if name == METRICS_FILE:
            self.write_scalars("train", line["step"], line)
        elif name == EVENTS_FILE and line["event"] in _EVENTS:
            self.write_scalars(line["event"], line["step"], line)
        elif name == EVENTS_FILE and line["event"] in BEGINNINGS:
            self._put(functools.partial(_write_facts, line))

    def write_scalars(self, group: str, step: int, values: Mapping[str, Any]) -> None:
        """Send numbers.

        Args:
            group: First part of their names.
            step: Completed optimizer steps.
            values: By name; what is neither a number nor a table of numbers is left out.
        """
        self._put(lambda tracker: tracker.write_scalars(step, dict(_scalars(group, values))))

    def write_picture(self, name: str, step: int, png: bytes) -> None:
        """Send a picture.

        Args:
            name: Such as "confusion".
            step: Completed optimizer steps.
            png: Content of a PNG file.
        """
        self._put(lambda tracker: tracker.write_picture(name, step, png))

    def _put(self, call: Call) -> None:
        for feed in self._feeds.values():
            feed.put(call)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, *_: object) -> None:
        failed = self._failed
        for feed in self._feeds.values():
            feed.end(lambda tracker: tracker.close(failed))
        deadline = time.monotonic() + _CLOSE_SECONDS
        for feed in self._feeds.values():
            feed.wait(max(deadline - time.monotonic(), 0.0))


def _scalars(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a line and of the tables in it, with their names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _scalars(f"{prefix}/{name}", value)
        elif isinstance(value, int | float) and name not in _NOT_SCALARS:
            yield f"{prefix}/{name}", float(value)


def _write_facts(line: Line, tracker: Tracker) -> None:
    names = ("attempt", "world_size", "manifest_fingerprint", "config_fingerprint")
    facts = {name: str(line[name]) for name in names}
    tracker.write_facts(facts | {f"version.{k}": str(v) for k, v in line["versions"].items()})


class _Feed:
    """The calls of one tracker, made in order by a thread of its own."""

    def __init__(self, name: str, tracker: Tracker, opening: Call) -> None:
        self._name, self._tracker = name, tracker
        self._opening = self._closing = opening  # `end` sets the latter
        self._calls: queue.Queue[Call | None] = queue.Queue(_MAX_WAITING)
        self._ending = threading.Event()
        self._left_out = 0
        self._is_on, self._is_suspect = True, False  # suspect: the call before never succeeded
        # A daemon: one that hangs must not keep the process.
        self._thread = threading.Thread(target=self._run, name=f"track-{name}", daemon=True)
        self._thread.start()

    def put(self, call: Call) -> None:
        """Queue a call, or leave it out if too many wait.

        Args:
            call: Gets the tracker.
        """
        if not self._is_on:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._left_out += 1
            if self._left_out == 1:
                log.warning("%s is too slow: some values are not sent to it", self._name)

    def end(self, call: Call) -> None:
        """Make a last call after all others, and end the thread; do not wait for that.

        Args:
            call: Gets the tracker.
        """
        self._closing = call
        self._ending.set()  # no call is then made again
        while self._is_on:
            try:
                self._calls.put_nowait(None)
                break
            except queue.Full:
                with contextlib.suppress(queue.Empty):  # the thread may be faster
                    self._calls.get_nowait()

    def wait(self, seconds: float) -> None:
        """Wait for the end of the thread.

        Args:
            seconds: At most; a thread that needs longer is left behind.
        """
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("%s does not answer: its last values are lost", self._name)
            self._abandon()

    def _abandon(self) -> None:
        self._is_on = False
        try:
            self._tracker.abandon()
        except Exception as error:
            log.debug("%s: %s", self._name, error)

    def _run(self) -> None:
        self._make(self._opening, is_needed=True)
        while self._is_on and (call := self._calls.get()) is not None:
            self._make(call)
        if self._is_on:
            self._make(self._closing, is_needed=True)

    def _make(self, call: Call, is_needed: bool = False) -> None:
        """Make a call until it succeeds; if it never does, leave it out or turn the tracker off."""
        waits = () if self._is_suspect else _WAITS
        error = self._failure(call)
        if error and waits:
            log.warning("%s failed: %s", self._name, _text(error))
        for seconds in waits:
            if error is None or isinstance(error, ConfigError) or self._ending.wait(seconds):
                break
            error = self._failure(call)
        if error and (is_needed or self._is_suspect):
            log.warning("%s is off until the run is started again: %s", self._name, _text(error))
            self._abandon()
        elif error:
            log.warning("%s refuses a value, which is left out: %s", self._name, _text(error))
        self._is_suspect = error is not None

    def _failure(self, call: Call) -> BaseException | None:
        try:
            call(self._tracker)
        except (Exception, SystemExit) as error:
            return error
        return None


def _text(error: BaseException) -> str:
    """Return the message of an error with the notes that were added to it."""
    return " ".join([str(error), *getattr(error, "__notes__", ())])
