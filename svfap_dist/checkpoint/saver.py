"""Write checkpoints while training continues, commit marker last, by one attempt at a time.

All ranks enter `Checkpointer.save` together. Each writes its part to a local folder; from there a
thread uploads it while training continues, then writes the rank's marker. Rank 0 copies the full
weights while training waits; its thread writes their file, waits for all markers, writes files.json
and COMMIT, and deletes what retention does not keep. Threads communicate through the store only,
never through collectives. A marker's name has a token drawn for this one save, so markers of a
killed attempt do not count. `finish_upload` returns to all ranks how an upload ended: one failure
is logged and the run continues, two in a row end it. The local copy of the newest committed
checkpoint stays until another one replaces it or the run ends, well or by an error that no restart
can fix: a restart on this node reads it.

The file OWNER in the run's folder is a fencing token, not a lease: an attempt that starts replaces
it at once, and an older attempt that finds another token before its next checkpoint ends without
writing to the run. The file also shows whether all ranks share one folder; with a local path on
several hosts they do not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import local_copies, store
from svfap_dist.checkpoint.best import BestCheckpoint, read_best, write_best
from svfap_dist.checkpoint.load import CheckpointEngine
from svfap_dist.checkpoint.local_copies import LocalCopy
from svfap_dist.checkpoint.store import STATE, WEIGHTS, TrainState, checkpoint_tag, checkpoint_url
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError, ConfigError, HealthError, StorageError, SvfapError
from svfap_dist.model import weights
from svfap_dist.model.weights import ModelInfo

OWNER = "OWNER"
_POLL_SECONDS = 0.5  # between listings for the other ranks' markers
_FAILURES_ALLOWED = 1  # in a row
_PARALLEL_MARKERS = 32  # read at a time by rank 0
_FULL_BYTES = 16 << 20  # a disk with less free space counts as full

log = logging.getLogger(__name__)


def read_owner(run_url: str) -> str:
    """Return the owner token of the latest attempt at a run, "none" without one.

    Args:
        run_url: URL of the run.
    """
    try:
        return storage.read_bytes(storage.join(run_url, OWNER)).decode(errors="replace")
    except storage.StorageMissingError:
        return "none"


def has_ended(owner: str) -> bool:
    """Return whether a token's process was on this host and has ended; False if unknown.

    Args:
        owner: Token from `read_owner`.
    """
    pid = _pid_on_this_host(owner)
    if pid is None:
        return False
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"  # dead, but its parent has not seen it yet


def _pid_on_this_host(owner: str) -> int | None:
    named = re.match(r"pid (\d+) on (.+), \w+$", owner)
    return int(named[1]) if named and named[2] == socket.gethostname() else None


class RunOwnership:
    """The owner token of this attempt, written to the run's folder; made by all ranks together.

    Args:
        run_url: URL of the run.
        world: This rank's place among all ranks.

    Raises:
        ConfigError: On every rank, if one does not see what rank 0 wrote.
    """

    def __init__(self, run_url: str, world: World) -> None:
        self._run_url, self._world = run_url, world
        self._url = storage.join(run_url, OWNER)
        mine = f"pid {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:8]}"
        self._token = distributed.broadcast_object(mine)
        distributed.run_on_all_ranks(self._write)
        distributed.run_on_all_ranks(self._check_visible)

    def _write(self) -> None:
        if not self._world.is_main:
            return
        before = read_owner(self._run_url)
        pid = _pid_on_this_host(before)
        if pid not in (None, os.getpid()) and not has_ended(before):
            log.warning(
                "The last process of this run, %d on this machine, seems to be alive. If it is "
                "still training, both train the same steps until its next checkpoint, where it "
                "exits with code %d. Stop one of them.",
                *(pid, HealthError.exit_code),
            )
        storage.write_bytes(self._url, self._token.encode())

    def _check_visible(self) -> None:
        if read_owner(self._run_url) != self._token:
            where = f"run.url = {self._run_url}, rank {self._world.rank}, {socket.gethostname()}"
            found = "the file that rank 0 wrote there is not visible"
            advice = "set run.url to an s3:// prefix, or a folder that all nodes share"
            raise ConfigError("Ranks do not share the run's folder", where, found, advice)

    def check(self) -> None:
        """Check that no newer attempt owns the run; a collective before anything is replaced.

        Raises:
            HealthError: On every rank, if a newer attempt has taken the run over.
        """
        distributed.run_on_all_ranks(self._check_on_main)

    def _check_on_main(self) -> None:
        if self._world.is_main and (owner := read_owner(self._run_url)) != self._token:
            found = f"owner {owner}; this is {self._token}"
            advice = "give each run a run.url of its own; this process has changed nothing since"
            raise HealthError("Another process has taken over this run", self._url, found, advice)


@dataclasses.dataclass(frozen=True)
class SaveOutcome:
    """How the upload of a checkpoint ended. error: "" if it is committed."""

    step: int
    num_bytes: int
    seconds: float  # from the start of saving to COMMIT
    error: str
    is_marked: bool = False  # as the best


class Checkpointer:
    """Saves the checkpoints of a run, one upload at a time; a context manager.

    Args:
        config: The run's recipe.
        world: This rank's place among all ranks.
        before_marker: Called in the upload thread before a rank's marker is written, to store files
            that must not be older than COMMIT (the run's journal).
        license: Of the network; empty: unknown.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        before_marker: Callable[[], None],
        license: str = "",
    ) -> None:
        self._config, self._world, self._license = config, world, license
        self._before_marker = before_marker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._upload: _Upload | None = None
        self._failures = 0
        self._kept: LocalCopy | None = None  # of the newest committed checkpoint
        if world.local_rank == 0:
            local_copies.remove_abandoned(config.run.url)

    def save(
        self, engine: CheckpointEngine, state: TrainState, best: BestCheckpoint | None = None
    ) -> None:
        """Write this rank's part to its local disk and start the upload; a collective.

        The previous upload must be finished.

        Args:
            engine: The engine to save.
            state: Train state after the completed steps.
            best: This checkpoint, if it is the best by probes so far; else None.

        Raises:
            CheckpointError: If a local disk is full.
        """
        assert self._upload is None
        if self._kept and _leaves_no_room(self._kept.path):
            self._remove_kept()
        upload = _Upload(self._config, self._world, state.step, self._before_marker, best)
        try:
            upload.write(engine, state, self._license)
        except BaseException:
            upload.clean()
            raise
        upload.start(self._pool)
        self._upload = upload

    @property
    def upload_ended(self) -> bool:
        """Return whether this rank knows that the upload in progress has ended."""
        return self._upload is not None and self._upload.has_ended

    def finish_upload(self) -> SaveOutcome | None:
        """Wait for the upload in progress, if any, and return its outcome; a collective.

        Raises:
            CheckpointError: On every rank, if this is the second failure in a row.
        """
        if self._upload is None:
            return None
        outcome = self._upload.finish()
        if not outcome.error:
            self._remove_kept()
            self._kept = self._upload.copy
            if self._world.local_rank == 0:  # also those of ranks that the run no longer has
                tag = checkpoint_tag(outcome.step)
                local_copies.remove_others(self._config.run.url, tag)
        self._upload = None
        self._failures = self._failures + 1 if outcome.error else 0
        if self._failures > _FAILURES_ALLOWED:
            title = f"{self._failures} checkpoints in a row could not be stored"
            where = checkpoint_url(self._config.run.url, outcome.step)
            advice = "repair the store and run the same command again: it resumes from the newest "
            advice += "committed checkpoint"
            raise CheckpointError(title, where, outcome.error, advice)
        return outcome

    def __enter__(self) -> Checkpointer:
        return self

    def _remove_kept(self) -> None:
        if self._kept is not None:
            self._kept.remove()
        self._kept = None

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        *_: object,
    ) -> None:
        if self._upload is not None:  # on an error: other ranks may have ended
            self._upload.cancel()
        self._pool.shutdown()
        if self._upload is not None:
            self._upload.clean()
        is_last = kind is None or (isinstance(error, SvfapError) and not error.retryable)
        if is_last:
            self._remove_kept()
        elif self._kept is not None:  # another attempt may read it
            self._kept.close()


class _Upload:
    """Upload of one checkpoint from this rank's disk to the store."""

    def __init__(
        self,
        config: Config,
        world: World,
        step: int,
        before_marker: Callable[[], None],
        best: BestCheckpoint | None,
    ) -> None:
        self._config, self._world, self._step, self._best = config, world, step, best
        self._before_marker = before_marker
        self._began = time.monotonic()
        self._url = checkpoint_url(config.run.url, step)
        self.copy = LocalCopy(config.run.url, world.rank)
        self._cancelled = threading.Event()
        self._uploading: Future[None] | None = None
        self._committing: Future[SaveOutcome] | None = None
        self._refusal = ""  # the store's error, if it failed before anything was written
        self._write_rest: Callable[[], None] = lambda: None  # writes the full weights and the state
        self._token = distributed.broadcast_object(uuid.uuid4().hex[:12])

    def write(self, engine: CheckpointEngine, state: TrainState, license: str) -> None:
        """Remove leftovers of this step, then write this rank's files locally; a collective."""
        self._refusal = distributed.broadcast_object(self._remove_leftover())
        if self._refusal:
            return
        try:
            engine.save(self.copy.path, checkpoint_tag(self._step))
        except (OSError, RuntimeError) as error:
            # torch reports both a full disk and a lost rank as RuntimeError.
            free = shutil.disk_usage(self.copy.path).free
            if isinstance(error, RuntimeError) and free > _FULL_BYTES:
                raise
            raise _no_room(self.copy.path, error) from error
        state_dict = engine.state_dict()
        if self._world.is_main:
            # A copy, since the next steps update the tensors in place.
            copied = {name: w.detach().to("cpu", copy=True) for name, w in state_dict.items()}
            build = engine.objective.build_arguments
            info = ModelInfo.of_run(build, self._config, state.provenance, license)
            self._write_rest = functools.partial(_write_rest, self._part, copied, info, state)

    @property
    def _part(self) -> str:
        """Return the local folder of this rank's files."""
        return os.path.join(self.copy.path, checkpoint_tag(self._step))

    def _remove_leftover(self) -> str:
        """On rank 0, remove an earlier attempt's files of this step; return the error or ""."""
        if self._world.is_main:
            try:
                store.delete(self._url)
            except StorageError as error:
                return str(error)
        return ""

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Start to upload and, on rank 0, to wait for all ranks and commit."""
        if self._refusal:
            return
        self._uploading = pool.submit(self._upload_part)
        if self._world.is_main:
            self._committing = pool.submit(self._commit)

    def _upload_part(self) -> None:
        write_rest, self._write_rest = self._write_rest, lambda: None
        write_rest()
        del write_rest  # frees the copied weights
        rows = store.upload(self._part, self._url)
        self._before_marker()
        marker = storage.join(self._url, _marker(self._world.rank, self._token))
        storage.write_bytes(marker, json.dumps(rows).encode())

    def _commit(self) -> SaveOutcome:
        markers = {_marker(rank, self._token) for rank in range(self._world.world_size)}
        while not markers <= storage.list_files(self._url).keys():
            if self._cancelled.wait(_POLL_SECONDS):
                return SaveOutcome(self._step, 0, 0.0, "cancelled")
        urls = [storage.join(self._url, marker) for marker in sorted(markers)]
        with ThreadPoolExecutor(_PARALLEL_MARKERS, thread_name_prefix="markers") as pool:
            rows = [row for data in pool.map(storage.read_bytes, urls) for row in json.loads(data)]
        store.commit(self._url, rows)
        seconds, is_marked = time.monotonic() - self._began, False
        try:
            if self._best is not None:
                write_best(self._config.run.url, self._best)
                is_marked = True
            self._delete_old()
        except StorageError as error:
            log.warning(
                "The checkpoint of step %d is stored, but could not be marked as the best, or old "
                "ones could not be deleted: %s",
                self._step,
                error,
            )
        num_bytes = sum(row["size"] for row in rows)
        return SaveOutcome(self._step, num_bytes, seconds, "", is_marked)

    def _delete_old(self) -> None:
        """Delete by retention, and what killed attempts left before this checkpoint."""
        run_url, train = self._config.run.url, self._config.train
        committed, leftovers = store.split_committed(store.list_checkpoints(run_url))
        outdated = store.steps_to_delete(committed, train.keep_last, train.keep_every)
        best = read_best(run_url) if outdated else None
        outdated = [step for step in outdated if best is None or step != best.step]
        for step in [step for step in leftovers if step < self._step] + outdated:
            store.delete(checkpoint_url(run_url, step))

    @property
    def has_ended(self) -> bool:
        """Return whether the upload ended: on rank 0 by the commit, on any by its own failure."""
        if self._uploading is None or (self._committing is not None and self._committing.done()):
            return True
        return self._uploading.done() and self._uploading.exception() is not None

    def finish(self) -> SaveOutcome:
        """Wait, clean up and return the same outcome on every rank; a collective."""
        if self._uploading is None:
            self.clean()
            return SaveOutcome(self._step, 0, 0.0, self._refusal)
        mine = _message(self._uploading)
        errors = [message for message in distributed.all_gather_object(mine) if message]
        if errors:
            self.cancel()
        outcome = None
        if self._committing is not None:
            errors += filter(None, [_message(self._committing)])
            if errors:
                outcome = SaveOutcome(self._step, 0, 0.0, errors[0])
                self._remove_leftover()  # an incomplete checkpoint only takes space
            else:
                outcome = self._committing.result()
        outcome = distributed.broadcast_object(outcome)
        if outcome.error:
            self.clean()
        return outcome

    def cancel(self) -> None:
        """Stop waiting for other ranks' markers."""
        self._cancelled.set()

    def clean(self) -> None:
        """Remove the local copy."""
        self.copy.remove()


def _write_rest(
    part: str, state_dict: Mapping[str, Tensor], info: ModelInfo, state: TrainState
) -> None:
    """Write the full weights and the state beside rank 0's shards."""
    try:
        weights.save(os.path.join(part, WEIGHTS), state_dict, info.build, info)
        storage.write_bytes(os.path.join(part, STATE), state.to_json())
    except (OSError, StorageError) as error:
        raise _no_room(part, error) from error


def _no_room(folder: str, error: Exception) -> CheckpointError:
    title = "Checkpoint cannot be written to the local disk"
    advice = "free space there, or set TMPDIR to a folder with more"
    return CheckpointError(title, folder, str(error), advice)


def _leaves_no_room(folder: str) -> bool:
    """Return whether there may be no room for another folder of this size beside it."""
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return shutil.disk_usage(folder).free < 2 * size


def _message(future: Future[Any]) -> str:
    """Return the error of a thread, "" without one; errors that are bugs are raised."""
    error = future.exception()
    if error is None:
        return ""
    if isinstance(error, (SvfapError, OSError)):
        return str(error)
    raise error


def _marker(rank: int, token: str) -> str:
    return f"ranks/rank-{rank:05d}.{token}.json"
