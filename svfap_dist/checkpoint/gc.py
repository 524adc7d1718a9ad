"""Removes checkpoints that nobody needs from a run that nobody trains: `svfap checkpoint gc`.

A run clears up by itself at each commit. What stays is what its end left: checkpoints that were
never committed, and, when retention is to be tighter from now on, old ones. In: the listing of a
run. Out: the steps that go, and, if asked to, their removal, COMMIT first. The newest committed
checkpoint and the newest whole one always stay.

Uncommitted files may be an upload under way, so a run that may be alive is refused. A run is idle
if its last event is a stop, if its process was on this host and is gone, or if it has said nothing
for an hour. Nothing is claimed, so an attempt may start at any time: it puts its mark first, and
the mark is looked at before each removal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from svfap_dist import storage
from svfap_dist.checkpoint import ownership, retention, store
from svfap_dist.checkpoint.store import COMMIT
from svfap_dist.config import TrainConfig
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.telemetry import ledger
from svfap_dist.telemetry.journal import read_recipe

_SILENT_SECONDS = 3600.0  # a living run tells of a window or checkpoint more often


@dataclasses.dataclass(frozen=True)
class Cleanup:
    """What goes and what stays, by step; bytes: what is freed."""

    run_url: str
    leftovers: tuple[int, ...]  # never committed
    outdated: tuple[int, ...]  # committed, and let go by retention
    kept: tuple[int, ...]
    bytes: int

    @property
    def steps(self) -> tuple[int, ...]:
        """All that goes, oldest first."""
        return tuple(sorted(self.leftovers + self.outdated))

    def lines(self) -> list[str]:
        """For people."""
        text = [f"step {step}: not committed" for step in self.leftovers]
        text += [f"step {step}: let go by retention" for step in self.outdated]
        kept = ", ".join(map(str, self.kept)) or "none"
        return [*text, f"{len(text)} to delete, {self.bytes} bytes; kept: {kept}"]


def plan(run_url: str, keep_last: int | None = None, keep_every: int | None = None) -> Cleanup:
    """What may go; without numbers, by the retention of the run's recipe.

    Raises: CheckpointError if the run may be alive or has no checkpoints; StorageError.
    """
    _require_idle(run_url, time.time)
    train = _retention(run_url)
    listing = store.listing(run_url)
    if not listing:
        raise CheckpointError(
            "No checkpoints",
            where=storage.join(run_url, "checkpoints"),
            found="nothing there",
            do="give the run.url of a run",
        )
    committed = sorted(step for step, files in listing.items() if COMMIT in files)
    outdated = retention.to_delete(
        committed,
        train.keep_last if keep_last is None else keep_last,
        train.keep_every if keep_every is None else keep_every,
    )
    needed = {*committed[-1:], store.latest_committed(run_url)}
    outdated = [step for step in outdated if step not in needed]
    leftovers = sorted(listing.keys() - set(committed))
    return Cleanup(
        run_url=run_url,
        leftovers=tuple(leftovers),
        outdated=tuple(outdated),
        kept=tuple(step for step in committed if step not in outdated),
        bytes=sum(sum(listing[step].values()) for step in leftovers + outdated),
    )


def carry_out(cleanup: Cleanup, on_deleted: Callable[[int], None] = lambda step: None) -> None:
    """Delete what a plan says, oldest first.

    Raises: CheckpointError if the run is alive again; what was deleted until then is deleted.
    """
    owner = ownership.mark_of(cleanup.run_url)
    _require_idle(cleanup.run_url, time.time)
    for step in cleanup.steps:
        found = ownership.mark_of(cleanup.run_url)
        if found != owner:
            raise _alive(cleanup.run_url, found, "it was started just now")
        store.delete(store.checkpoint_url(cleanup.run_url, step))
        on_deleted(step)


def _retention(run_url: str) -> TrainConfig:
    try:
        return read_recipe(run_url).train
    except ConfigError:  # checkpoints without a run, as `reshape` makes them
        return TrainConfig()


def _require_idle(run_url: str, clock: Callable[[], float]) -> None:
    last = None
    for event in ledger.events(run_url):
        last = event
    owner = ownership.mark_of(run_url)
    if last is None or last["event"] == "stop" or ownership.is_gone(owner):
        return
    silent = clock() - last["time"]
    if silent < _SILENT_SECONDS:
        raise _alive(run_url, owner, f"its last event, {last['event']}, is {silent:.0f} s old")


def _alive(run_url: str, owner: str, found: str) -> CheckpointError:
    return CheckpointError(
        "The run may be alive",
        where=run_url,
        found=f"{found}; it belongs to {owner}",
        do="stop it first (`svfap launch stop`); a run that was killed on another host counts as "
        f"dead after {_SILENT_SECONDS / 60:.0f} minutes without an event",
    )
