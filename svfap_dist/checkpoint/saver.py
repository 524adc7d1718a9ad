"""Saves checkpoints while training goes on, COMMIT last.

All ranks enter `Checkpointer.save` together. Each writes its part to a local folder; from there a
thread uploads it while training goes on, then puts the rank's marker. Of the full weights rank 0
only takes a copy while training waits; its thread writes their file. That thread waits for all
markers, writes files.json and COMMIT, and deletes what retention lets go. Threads talk through the
store only, never through collectives. A marker's name carries a token drawn for this one save, so
what a killed attempt left behind counts for nothing. `settle` is where all ranks learn how an
upload ended: one failure is told and the run goes on, two in a row end it.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import retention, store
from svfap_dist.checkpoint.state import CheckpointEngine, TrainState
from svfap_dist.checkpoint.store import COMMIT, STATE, WEIGHTS, checkpoint_url, tag_of
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError, StorageError, SvfapError
from svfap_dist.model import weights

_SECONDS_BETWEEN_LOOKS = 0.5  # for the other ranks' markers
_FAILURES_ALLOWED = 1  # in a row
_FULL_BYTES = 16 << 20  # a disk with less room than this is full

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How the upload of a checkpoint ended. error: "" if it is committed."""

    step: int
    num_bytes: int
    seconds: float  # from the start of saving to COMMIT
    error: str


class Checkpointer:
    """Saves the checkpoints of a run, one upload at a time; a context manager.

    Args:
        before_marker: called in the upload thread before a rank's marker is put: what must be
            stored no later than COMMIT (the run's journal).
    """

    def __init__(self, config: Config, world: World, before_marker: Callable[[], None]) -> None:
        self._config, self._world = config, world
        self._before_marker = before_marker
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._upload: _Upload | None = None
        self._failures = 0
        # What a killed attempt left on this disk.
        for folder in glob.glob(os.path.join(tempfile.gettempdir(), _prefix(config, world) + "*")):
            shutil.rmtree(folder, ignore_errors=True)

    def save(self, engine: CheckpointEngine, state: TrainState) -> None:
        """Write all ranks' parts to local disks and begin to upload; all ranks call it together.

        Settle the upload before it first. Raises: CheckpointError if a local disk is full.
        """
        assert self._upload is None
        upload = _Upload(self._config, self._world, state.step, self._before_marker)
        try:
            upload.write(engine, state)
        except BaseException:
            upload.clean()
            raise
        upload.start(self._pool)
        self._upload = upload

    @property
    def wants_settling(self) -> bool:
        """Whether this rank knows that the upload in flight has ended."""
        return self._upload is not None and self._upload.has_ended

    def settle(self) -> Outcome | None:
        """Wait for the upload in flight, if any; all ranks call it together and get the same.

        Raises: CheckpointError on every rank if this is the second failure in a row.
        """
        if self._upload is None:
            return None
        outcome = self._upload.settle()
        self._upload = None
        self._failures = self._failures + 1 if outcome.error else 0
        if self._failures > _FAILURES_ALLOWED:
            raise CheckpointError(
                f"{self._failures} checkpoints in a row could not be stored",
                where=checkpoint_url(self._config.run.url, outcome.step),
                found=outcome.error,
                do="mend the store and run the same command again: it resumes from the newest "
                "committed checkpoint",
            )
        return outcome

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._upload is not None:  # an error is on its way: other ranks may be gone
            self._upload.cancel()
        self._pool.shutdown()
        if self._upload is not None:
            self._upload.clean()


class _Upload:
    """One checkpoint on its way from this rank's disk to the store."""

    def __init__(
        self, config: Config, world: World, step: int, before_marker: Callable[[], None]
    ) -> None:
        self._config, self._world, self._step = config, world, step
        self._before_marker = before_marker
        self._began = time.monotonic()
        self._url = checkpoint_url(config.run.url, step)
        self._folder = tempfile.mkdtemp(prefix=_prefix(config, world))
        self._cancelled = threading.Event()
        self._uploading: Future[None] | None = None
        self._committing: Future[Outcome] | None = None
        self._refusal = ""  # of the store, before anything was written
        self._write_rest: Callable[[], None] = lambda: None  # what needs no engine
        self._token = distributed.broadcast_object(uuid.uuid4().hex[:12])

    def write(self, engine: CheckpointEngine, state: TrainState) -> None:
        """Collective: clear the way, then write this rank's files to the local disk."""
        self._refusal = distributed.broadcast_object(self._remove_leftover())
        if self._refusal:
            return
        try:
            engine.save(self._folder, tag_of(self._step))
        except (OSError, RuntimeError) as error:
            # torch reports a full disk as a RuntimeError, and so it does a rank that is gone.
            if (
                isinstance(error, RuntimeError)
                and shutil.disk_usage(self._folder).free > _FULL_BYTES
            ):
                raise
            raise _no_room(self._folder, error) from error
        state_dict = engine.state_dict()
        if self._world.is_main:
            # The next steps change the tensors in place.
            copied = {
                name: value.detach().to("cpu", copy=True) for name, value in state_dict.items()
            }
            build = engine.objective.build_arguments
            self._write_rest = functools.partial(_write_rest, self._part, copied, build, state)

    @property
    def _part(self) -> str:
        """This rank's files."""
        return os.path.join(self._folder, tag_of(self._step))

    def _remove_leftover(self) -> str:
        """Rank 0 removes what an earlier attempt left of this step; what went wrong, or ""."""
        if self._world.is_main:
            try:
                store.delete(self._url)
            except StorageError as error:
                return str(error)
        return ""

    def start(self, pool: ThreadPoolExecutor) -> None:
        """Begin to upload, and on rank 0 to wait for all and commit."""
        if self._refusal:
            return
        self._uploading = pool.submit(self._upload_part)
        if self._world.is_main:
            self._committing = pool.submit(self._commit)

    def _upload_part(self) -> None:
        write_rest, self._write_rest = self._write_rest, lambda: None
        write_rest()
        del write_rest  # and with it the copied weights
        rows = store.upload(self._part, self._url)
        self._before_marker()
        storage.write_bytes(
            storage.join(self._url, _marker(self._world.rank, self._token)),
            json.dumps(rows).encode(),
        )

    def _commit(self) -> Outcome:
        markers = {_marker(rank, self._token) for rank in range(self._world.world_size)}
        while not markers <= storage.list_files(self._url).keys():
            if self._cancelled.wait(_SECONDS_BETWEEN_LOOKS):
                return Outcome(self._step, 0, 0.0, "cancelled")
        rows = [
            row
            for marker in sorted(markers)
            for row in json.loads(storage.read_bytes(storage.join(self._url, marker)))
        ]
        store.commit(self._url, rows)
        seconds = time.monotonic() - self._began
        try:
            self._sweep()
        except StorageError as error:
            log.warning("Old checkpoints not deleted, will try again: %s", error)
        return Outcome(self._step, sum(row["size"] for row in rows), seconds, "")

    def _sweep(self) -> None:
        """Delete what retention lets go, and what killed attempts left before this checkpoint."""
        run_url, train = self._config.run.url, self._config.train
        listing = store.listing(run_url)
        committed = [step for step, files in listing.items() if COMMIT in files]
        leftovers = [step for step in listing if step < self._step and step not in committed]
        for step in leftovers + retention.to_delete(committed, train.keep_last, train.keep_every):
            store.delete(checkpoint_url(run_url, step))

    @property
    def has_ended(self) -> bool:
        """Whether this rank knows the end: rank 0 of the commit, any rank of its own failure."""
        if self._uploading is None or (self._committing is not None and self._committing.done()):
            return True
        return self._uploading.done() and self._uploading.exception() is not None

    def settle(self) -> Outcome:
        """Collective: how it ended, the same on every rank."""
        if self._uploading is None:
            self.clean()
            return Outcome(self._step, 0, 0.0, self._refusal)
        mine = _message(self._uploading)
        errors = [message for message in distributed.all_gather_object(mine) if message]
        if errors:
            self.cancel()
        outcome = None
        if self._committing is not None:
            errors += filter(None, [_message(self._committing)])
            if errors:
                outcome = Outcome(self._step, 0, 0.0, errors[0])
                self._remove_leftover()  # half a checkpoint would only take space
            else:
                outcome = self._committing.result()
        self.clean()
        return distributed.broadcast_object(outcome)

    def cancel(self) -> None:
        """Wait no longer for other ranks' markers."""
        self._cancelled.set()

    def clean(self) -> None:
        """Remove the local copy."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write_rest(
    part: str, state_dict: Mapping[str, Tensor], build: Mapping[str, Any], state: TrainState
) -> None:
    """Write the full weights and the state beside rank 0's shards."""
    try:
        weights.save(os.path.join(part, WEIGHTS), state_dict, build)
        storage.write_bytes(os.path.join(part, STATE), state.to_json())
    except (OSError, StorageError) as error:
        raise _no_room(part, error) from error


def _no_room(folder: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        "Checkpoint cannot be written to the local disk",
        where=folder,
        found=str(error),
        do="free space there, or set TMPDIR to a folder with more",
    )


def _prefix(config: Config, world: World) -> str:
    """Of the names of this rank's local folders for this run."""
    return f"svfap-{store.sha256(config.run.url.encode())[:12]}-rank-{world.rank:05d}-"


def _message(future: Future[Any]) -> str:
    """What went wrong in a thread, "" if nothing; errors that are not the world's are raised."""
    error = future.exception()
    if error is None:
        return ""
    if isinstance(error, (SvfapError, OSError)):
        return str(error)
    raise error


def _marker(rank: int, token: str) -> str:
    return f"ranks/rank-{rank:05d}.{token}.json"
