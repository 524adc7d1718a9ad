"""The watchdog of a rank: notices that a run makes no progress, writes all stacks, ends the rank.

Every rank sends a heartbeat through the store of the process group, over a connection of its own
that no other use can block, and reads those of the others: rank 0 all of them, the others that of
rank 0. The first rank that sees a stall (`stalls.judge`) writes its verdict to the store. Then
every rank writes its stacks, and those of its feeders and decode workers, to `stalls/attempt-0001/`
of the run (`stalls/starting-ID/` before the attempt begins), reports its place in the code, and
exits without any clean-up: what hangs cannot be ended otherwise. The launcher restarts the ranks,
from the newest checkpoint.

Three things run beside the training thread, because each of them may hang: a thread that uses the
store, a thread that judges, and faulthandler's timer in C for an interpreter that does not run.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from svfap_dist import distributed, storage
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import SvfapError
from svfap_dist.parallel import stacks
from svfap_dist.telemetry import activity, journal
from svfap_dist.train import stalls
from svfap_dist.train.stalls import Beat, StallError, Verdict

_SLOW_FACTOR = 5.0  # multiple of its median duration that an activity may take
_BEATS_PER_LIMIT = 20  # in stall_seconds
_MIN_PERIOD, _MAX_PERIOD = 0.1, 3.0  # seconds between beats
_ANSWER_SECONDS = 5.0  # for all ranks to report their places
_WRITE_SECONDS = 4.0  # for each file and message before the exit

log = logging.getLogger(__name__)
Result = TypeVar("Result")


class Watchdog:
    """Watches the training thread that makes it and those of all other ranks; a context manager.

    Made by all ranks together.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        on_stall: Called with the completed steps and the error, by the rank that decides.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        on_stall: Callable[[int, Exception], None] = lambda step, error: None,
    ) -> None:
        self._run_url, self._world, self._on_stall = config.run.url, world, on_stall
        self._limit = float(config.train.stall_seconds)
        self._slow_limit = max(self._limit, config.train.collective_timeout_seconds)
        self._period = min(max(self._limit / _BEATS_PER_LIMIT, _MIN_PERIOD), _MAX_PERIOD)
        self._training_thread = threading.get_ident()
        self._number, self._seen = 0, (0, 0)  # of beats; of activities and collectives
        self._seconds = 0.0  # since either changed
        self.attempt = 0  # its number; 0: it has not begun yet
        self.record: Callable[[dict[str, Any]], None] = lambda report: None  # rank 0: the event
        self._closing = threading.Event()
        activity.start()
        self._exchange: _Exchange | None = None
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._limit:
            self._exchange = _Exchange(self._world, self._period, self._beat())
            self._exchange.start()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        if self._exchange is not None:
            self._thread.join()
            self._exchange.close(self._beat(ended=True))

    def _beat(self, ended: bool = False) -> Beat:
        self._number += 1
        now = activity.current()
        base = self._slow_limit if now.is_slow else self._limit
        return Beat(
            host=socket.gethostname(),
            pid=os.getpid(),
            number=self._number,
            step=now.step,
            activity=now.name,
            seconds=self._seconds,
            limit=max(base, _SLOW_FACTOR * activity.median_seconds(now.name)),
            collectives=_collectives(),
            ended=ended,
        )

    def _watch(self) -> None:
        """Judge the beats of all ranks until the end; runs in a thread."""
        exchange, before = self._exchange, time.monotonic()
        assert exchange is not None
        silences = dict.fromkeys(range(self._world.world_size), 0.0)
        numbers: dict[int, int] = {}
        unanswered, answers = 0.0, 0
        try:
            while not self._closing.wait(self._period):
                # In C, to standard error, should no Python code run any more.
                seconds = self._limit + 3 * self._period
                faulthandler.dump_traceback_later(seconds, exit=True, file=2)
                now = time.monotonic()
                # A process that was stopped itself must not blame others for that time.
                passed, before = min(now - before, 2 * self._period), now
                progress = activity.current().number, _collectives()
                self._seconds = self._seconds + passed if progress == self._seen else 0.0
                self._seen = progress
                own = exchange.beat = self._beat()
                beats = {**exchange.beats, self._world.rank: own}
                unanswered = unanswered + passed if exchange.answers == answers else 0.0
                answers = exchange.answers
                for rank, beat in beats.items():
                    is_new = beat.number != numbers.get(rank)
                    silences[rank] = 0.0 if is_new else silences[rank] + passed
                    numbers[rank] = beat.number
                # Without an answer nothing is known of the others.
                known = beats if not unanswered else {self._world.rank: own}
                verdict = exchange.verdict or stalls.judge(known, silences, self._limit)
                if self._world.world_size > 1 and unanswered > self._limit:
                    verdict = Verdict("store", (0,), unanswered)
                exchange.reads_all = self._world.is_main or own.seconds > self._limit / 2
                if verdict is not None and (not unanswered or verdict.kind == "store"):
                    self._end(verdict, beats)
        except Exception:
            log.exception("The watchdog of rank %d has failed; the run continues", self._world.rank)
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _end(self, verdict: Verdict, beats: dict[int, Beat]) -> None:
        """Write the stacks, report this rank's place, and end this process."""
        exchange, rank = self._exchange, self._world.rank
        assert exchange is not None
        faulthandler.cancel_dump_traceback_later()
        has_store = verdict.kind != "store"
        decides = not has_store and rank == 1
        if has_store:
            agreed = _call_with_timeout(_WRITE_SECONDS, lambda: exchange.propose(verdict, rank))
            verdict, decides = (agreed[0], agreed[1] == rank) if agreed else (verdict, False)
        own = stacks.own_stacks()
        children = stacks.stacks_of_children()
        place = _describe_place(own, children, self._training_thread)
        # The next attempt may have the same number if this one has not begun.
        starting = f"{journal.STARTING}-{exchange.name}"
        name = journal.attempt_folder(self.attempt) if self.attempt else starting
        folder = storage.join(self._run_url, journal.STALLS_FOLDER, name)
        text = f"{self._beat()}\nat {place}\n\n{own}\n{children}{_nccl_records()}"
        writing = _Task(
            lambda: storage.write_bytes(storage.join(folder, f"rank-{rank:04d}.txt"), text.encode())
        )
        places = {rank: place}
        if has_store:
            seconds = _ANSWER_SECONDS if decides else 0.0
            found = _call_with_timeout(
                _WRITE_SECONDS + seconds, lambda: exchange.share_place(place, verdict, seconds)
            )
            places |= found or {}
        error = stalls.explain(verdict, beats, places, _process_state(verdict, beats), folder)
        if decides:
            self._report(error, verdict, beats, places, folder, has_store)
        elif has_store and (
            report := _call_with_timeout(2 * _ANSWER_SECONDS, exchange.wait_for_report)
        ):
            error = StallError(*report["error"])
            if self._world.is_main:
                _call_with_timeout(_WRITE_SECONDS, lambda: self.record(report))
        log.error("%s", error)
        if not writing.wait(_WRITE_SECONDS):
            log.error("The stacks of rank %d could not be stored:\n%s", rank, text)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(error.exit_code)

    def _report(
        self,
        error: StallError,
        verdict: Verdict,
        beats: dict[int, Beat],
        places: dict[int, str],
        folder: str,
        has_store: bool,
    ) -> None:
        """Report to the launcher and the other ranks, and write it to the run's files."""
        first = verdict.ranks[0]
        beat = beats.get(first)
        report = {
            "attempt": self.attempt,
            "step": beat.step if beat else 0,
            "kind": verdict.kind,
            "ranks": list(verdict.ranks),
            "host": beat.host if beat else "",
            "activity": beat.activity if beat else "",
            "place": places.get(first, ""),
            "seconds": round(verdict.seconds, 1),
            "stacks": folder,
            "error": [error.what, error.where, error.found, error.do],
            "time": time.time(),
        }
        data = json.dumps(report).encode()
        tasks = [
            _Task(lambda: storage.write_bytes(storage.join(folder, journal.STALL_FILE), data)),
            _Task(lambda: self._on_stall(report["step"], error)),
        ]
        if self._world.is_main:
            tasks.append(_Task(lambda: self.record(report)))
        if has_store and self._exchange is not None:
            exchange = self._exchange
            tasks.append(_Task(lambda: exchange.report(report)))
        deadline = time.monotonic() + _WRITE_SECONDS
        for task in tasks:
            task.wait(max(deadline - time.monotonic(), 0.1))


class _Exchange(threading.Thread):
    """Sends this rank's beats through the group's store, and reads those of the others."""

    def __init__(self, world: World, period: float, beat: Beat) -> None:
        super().__init__(name="heartbeat", daemon=True)
        from torch.distributed import distributed_c10d

        self._rank, self._size, self._period = world.rank, world.world_size, period
        self._closing = threading.Event()
        self.beat, self.reads_all = beat, world.is_main
        self.beats: dict[int, Beat] = {}
        self.verdict: Verdict | None = None
        self.answers = 0
        # Of this watchdog among those of this group: a fine-tuning has one per fold.
        self.name = distributed.broadcast_object(os.urandom(6).hex())
        group: Any = distributed_c10d._get_default_store()
        self._store: Any = distributed_c10d.PrefixStore(f"watchdog-{self.name}", group.clone())
        self._store.set(f"beat {self._rank}", beat.dumps())
        if world.is_main:
            self._store.set("verdict", "")
        distributed.barrier()  # reading what is not there yet would block

    def run(self) -> None:
        """See `threading.Thread.run`."""
        while not self._closing.is_set() and self.verdict is None:
            try:
                self._send_and_read()
            except RuntimeError:  # the store has ended with its host: `answers` stays as it is
                return
            self._closing.wait(self._period)

    def _send_and_read(self) -> None:
        self._store.set(f"beat {self._rank}", self.beat.dumps())
        ranks = range(self._size) if self.reads_all else range(1)
        found = self._store.multi_get(["verdict", *(f"beat {rank}" for rank in ranks)])
        self.beats = {rank: Beat.loads(text) for rank, text in zip(ranks, found[1:], strict=True)}
        if found[0]:
            self.verdict = _verdict_of(found[0])[0]
        self.answers += 1

    def close(self, last: Beat) -> None:
        """Send a last beat and stop.

        Args:
            last: Of a rank that has ended.
        """
        self._closing.set()
        self.join(_MIN_PERIOD + 1.0)
        if not self.is_alive():
            with contextlib.suppress(RuntimeError):
                self._store.set(f"beat {self._rank}", last.dumps())

    def propose(self, verdict: Verdict, rank: int) -> tuple[Verdict, int]:
        """Return the first verdict of any rank, and that rank.

        Args:
            verdict: Of this rank.
            rank: This rank.
        """
        text = json.dumps([verdict.dumps(), rank])
        return _verdict_of(self._store.compare_set("verdict", "", text))

    def share_place(self, place: str, verdict: Verdict, seconds: float) -> dict[int, str]:
        """Report where this rank is, and return where the others are.

        Args:
            place: Of this rank.
            verdict: That of all ranks.
            seconds: To wait for the ranks that are behind, or for all if they are silent.
        """
        self._store.set(f"place {self._rank}", place)
        deadline = time.monotonic() + seconds
        wanted = set(range(self._size)) - (
            set(verdict.ranks) if verdict.kind == "silent" else set()
        )
        found: dict[int, str] = {}
        while wanted and time.monotonic() < deadline:
            for rank in sorted(wanted):
                if self._store.check([f"place {rank}"]):
                    found[rank] = self._store.get(f"place {rank}").decode()
            wanted -= found.keys()
            time.sleep(_MIN_PERIOD)
        return found

    def report(self, report: dict[str, Any]) -> None:
        """Show the other ranks what was found.

        Args:
            report: Fields of the event.
        """
        self._store.set("report", json.dumps(report))

    def wait_for_report(self) -> dict[str, Any]:
        """Return the report of the rank that decides."""
        self._store.set_timeout(datetime.timedelta(seconds=2 * _ANSWER_SECONDS))
        return json.loads(self._store.get("report"))


def _verdict_of(text: bytes) -> tuple[Verdict, int]:
    verdict, rank = json.loads(text)
    return Verdict.loads(verdict), rank


class _Task:
    """A call in a thread of its own, which may hang."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._call, self.result = call, None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.result = self._call()
        except (SvfapError, OSError, RuntimeError, ValueError) as error:
            log.warning("While ending a stalled rank: %s", error)

    def wait(self, seconds: float) -> bool:
        """Wait for the end, and return whether it came."""
        self._thread.join(seconds)
        return not self._thread.is_alive()


def _call_with_timeout(seconds: float, call: Callable[[], Result]) -> Result | None:
    """Return the result of a call, None if it fails or takes too long."""
    task = _Task(call)
    return task.result if task.wait(seconds) else None


def _collectives() -> int:
    """Return how many collectives this rank has begun."""
    import torch.distributed as dist

    with contextlib.suppress(RuntimeError, AttributeError, ValueError):
        return dist.group.WORLD._get_sequence_number_for_group()  # type: ignore[union-attr]
    return 0


def _nccl_records() -> str:
    """Return NCCL's record of its last collectives, "" where there is none."""
    import torch

    if not torch.cuda.is_available():
        return ""
    with contextlib.suppress(Exception):  # an older torch, or one without NCCL
        from torch._C import _distributed_c10d as c10d

        dump: Any = c10d._dump_nccl_trace_json  # type: ignore[reportAttributeAccessIssue]
        return "\nNCCL's flight recorder:\n" + dump().decode() + "\n"
    return ""


def _describe_place(own: str, children: str, training_thread: int) -> str:
    """Return where the training thread is, and which other threads or processes hold it up."""
    found = stacks.frames(own)
    main = [str(frame) for frame in found if frame.thread == training_thread]
    others = [frame for frame in found if frame.thread != training_thread]
    of_children = stacks.frames(children)
    busy = {str(f) for f in others + of_children if "/storage/" in f.path or "/video/" in f.path}
    if not busy:  # a feeder may hang in its own code
        busy = {str(frame) for frame in of_children if "/parallel/" not in frame.path}
    text = main[0] if main else "an unknown place"
    if busy:
        text += f" (other threads at {', '.join(sorted(busy)[:3])})"
    if stopped := stacks.stopped_children(children):
        text += f" (child processes that do not run: {', '.join(map(str, stopped[:3]))})"
    return text


def _process_state(verdict: Verdict, beats: dict[int, Beat]) -> str:
    """Return what this host knows of the process of a silent rank, "" if it is elsewhere."""
    beat = beats.get(verdict.ranks[0])
    if verdict.kind not in ("silent", "store") or beat is None:
        return ""
    if beat.host != socket.gethostname():
        return ""
    state = stacks.state_of(beat.pid)
    if state in ("", "Z"):
        return "its process has ended"
    if state in ("T", "t"):
        return "its process is stopped by a signal"
    return f"its process is in state {state}, but its interpreter does not run"
