"""Garbage-collect checkpoints of an idle run: `svfap checkpoint gc`.

A run deletes old checkpoints itself at each commit. This removes what remains after its end:
checkpoints that were never committed and, for a tighter retention, old ones. In: the listing of a
run. Out: the steps to delete and, on request, their deletion, commit marker first. The newest
committed checkpoint, the newest undamaged one and the best one by probes are always kept.

Uncommitted files may be an upload in progress, so a run that may be alive is refused. A run is idle
if its last event is a stop, if its process was on this host and has ended, or if it has written no
event for an hour. No lock is taken: an attempt that starts meanwhile writes its owner file first,
and that file is read before each deletion.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable

from svfap_dist import storage
from svfap_dist.checkpoint import saver, store
from svfap_dist.checkpoint.best import read_best
from svfap_dist.config import TrainConfig
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.telemetry.journal import read_events, read_recipe

_SILENT_SECONDS = 3600.0  # a living run writes windows and checkpoints more often


@dataclasses.dataclass(frozen=True)
class GcPlan:
    """Steps to delete and to keep; bytes: size of what is deleted."""

    run_url: str
    leftovers: tuple[int, ...]  # never committed
    outdated: tuple[int, ...]  # committed, and not kept by retention
    kept: tuple[int, ...]
    bytes: int

    @property
    def steps(self) -> tuple[int, ...]:
        """Return all steps to delete, oldest first."""
        return tuple(sorted(self.leftovers + self.outdated))

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        text = [f"step {step}: not committed" for step in self.leftovers]
        text += [f"step {step}: not kept by retention" for step in self.outdated]
        kept = ", ".join(map(str, self.kept)) or "none"
        return [*text, f"{len(text)} to delete, {self.bytes} bytes; kept: {kept}"]


def plan_gc(run_url: str, keep_last: int | None = None, keep_every: int | None = None) -> GcPlan:
    """Return the checkpoints that can be deleted.

    Args:
        run_url: URL of the run.
        keep_last: Number of newest checkpoints to keep; None: train.keep_last of the run's recipe.
        keep_every: Keep multiples of this step, too; None: train.keep_every of the run's recipe.

    Raises:
        CheckpointError: If the run may be alive or has no checkpoints.
    """
    _require_idle(run_url)
    train = _retention(run_url)
    listing = store.list_checkpoints(run_url)
    if not listing:
        where, advice = storage.join(run_url, "checkpoints"), "give the run.url of a run"
        raise CheckpointError("No checkpoints", where, "no files", advice)
    committed, leftovers = store.split_committed(listing)
    best = read_best(run_url)
    needed = {*committed[-1:], store.latest_committed(run_url), best.step if best else None}
    outdated = store.steps_to_delete(
        committed,
        train.keep_last if keep_last is None else keep_last,
        train.keep_every if keep_every is None else keep_every,
    )
    outdated = [step for step in outdated if step not in needed]
    return GcPlan(
        run_url=run_url,
        leftovers=tuple(leftovers),
        outdated=tuple(outdated),
        kept=tuple(step for step in committed if step not in outdated),
        bytes=sum(sum(listing[step].values()) for step in leftovers + outdated),
    )


def run_gc(plan: GcPlan, on_deleted: Callable[[int], None] = lambda step: None) -> None:
    """Delete the checkpoints of a plan, oldest first.

    Args:
        plan: From `plan_gc`.
        on_deleted: Called with each step that was deleted.

    Raises:
        CheckpointError: If the run is alive again; earlier deletions stay.
    """
    owner = saver.read_owner(plan.run_url)
    _require_idle(plan.run_url)
    for step in plan.steps:
        found = saver.read_owner(plan.run_url)
        if found != owner:
            raise _alive(plan.run_url, found, "a new attempt has started")
        store.delete(store.checkpoint_url(plan.run_url, step))
        on_deleted(step)


def _retention(run_url: str) -> TrainConfig:
    try:
        return read_recipe(run_url).train
    except ConfigError:  # checkpoints without a run, as `reshard` makes them
        return TrainConfig()


def _require_idle(run_url: str) -> None:
    last = next(iter(collections.deque(read_events(run_url), maxlen=1)), None)
    owner = saver.read_owner(run_url)
    if last is None or last["event"] == "stop" or saver.has_ended(owner):
        return
    silent = time.time() - last["time"]
    if silent < _SILENT_SECONDS:
        raise _alive(run_url, owner, f"its last event, {last['event']}, is {silent:.0f} s old")


def _alive(run_url: str, owner: str, found: str) -> CheckpointError:
    advice = "stop it first (`svfap launch stop`); a run that was killed on another host counts as "
    advice += f"idle after {_SILENT_SECONDS / 60:.0f} minutes without an event"
    return CheckpointError("Run may be alive", run_url, f"{found}; its owner is {owner}", advice)
