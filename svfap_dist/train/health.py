"""Per-step consensus of all ranks, read one step late.

Each rank reports whether it has a reason to stop, whether its upload has ended, and how many of its
samples were bad. The engine adds these numbers over all ranks together with the loss and the norm
of the gradient, and the device leaves the weights as they are if one of those is not finite, so no
host has to wait for the sums: they are read when the next step is already in the device's queue, or
at once where something depends on them. Every rank reads the same sums and decides the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from svfap_dist import distributed
from svfap_dist.config import TrainConfig
from svfap_dist.errors import HealthError
from svfap_dist.train.update import Update

_MIN_SAMPLES = 1000  # lower bound of the denominator, so that a few early bad samples may pass
_KEYS_NAMED = 8


class NotFiniteError(HealthError):
    """A loss or gradient has infinities or NaN."""


@dataclasses.dataclass(frozen=True)
class StepVote:
    """One rank's vote on what all ranks do after a step."""

    stop: bool = False  # save and stop
    finish_upload: bool = False  # collect the outcome of the checkpoint upload, which has ended
    save: bool = False  # save and continue, since a node will be preempted

    def counts(self, samples: int, bad: int) -> tuple[float, ...]:
        """Return the numbers to add over all ranks, as `Health` reads them.

        Args:
            samples: Number of the rank's samples in the step.
            bad: Number of bad ones among them.
        """
        return (bad, samples, self.stop, self.finish_upload, self.save)


@dataclasses.dataclass(frozen=True)
class StepDecision(StepVote):
    """Decision of all ranks after some steps: all that at least one of them voted for."""

    loss: float = 0.0  # of the last of these steps, mean over all ranks
    grad_norm: float = 0.0  # of the last of these steps, before clipping


NOTHING = StepDecision()


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A step whose sums are not read yet."""

    step: int
    keys: Callable[[], list[str]]  # of this rank's clips
    update: Update


class Health:
    """Steps whose outcome is not read yet, and the decisions of all ranks after them.

    completed: steps whose outcome is known to be good, of the whole run.

    Args:
        max_bad_fraction: Share of bad samples above which the run ends.
        completed: Steps before this attempt.
    """

    def __init__(self, max_bad_fraction: float, completed: int = 0) -> None:
        self._max_bad_fraction, self.completed = max_bad_fraction, completed
        self._all_seen = self._all_bad = 0.0  # samples of all ranks so far
        self._pending: list[_Pending] = []

    def add(self, step: int, keys: Callable[[], list[str]], update: Update) -> None:
        """Add a step that is queued on the device.

        Args:
            step: Number of the step, from 1.
            keys: Returns the keys of this rank's clips; called if its loss is not finite.
            update: Its update, with the `counts` of this rank's vote.
        """
        self._pending.append(_Pending(step, keys, update))

    def decide(self, up_to_now: bool, before: StepDecision = NOTHING) -> StepDecision:
        """Return the decision of all ranks, and drop the steps that it covers.

        Args:
            up_to_now: Whether to wait for the newest step; otherwise only steps before it count.
            before: A decision to add to.

        Raises:
            HealthError: On every rank, if a loss or gradient is not finite or too many samples are
                bad.
        """
        while len(self._pending) > (0 if up_to_now else 1):
            before = self._add_votes(before, self._pending.pop(0))
        return before

    def _add_votes(self, before: StepDecision, pending: _Pending) -> StepDecision:
        result = pending.update.read()
        bad, seen, stops, uploads, saves = result.counts
        if not result.losses_are_finite:
            raise _not_finite(pending.step, [] if result.own_loss_is_finite else pending.keys())
        if not result.applied:
            raise _gradient_not_finite(pending.step)
        self._all_bad += bad
        self._all_seen += seen
        if self._all_bad > self._max_bad_fraction * max(self._all_seen, _MIN_SAMPLES):
            found = f"{self._all_bad:.0f} of {self._all_seen:.0f} samples, more than "
            found += f"data.max_bad_fraction = {self._max_bad_fraction}"
            do = "see quarantine.jsonl of the run for keys and reasons; try `svfap shards verify`"
            raise HealthError("Too many bad samples", "data.url", found, do)
        self.completed = pending.step
        return StepDecision(
            stop=before.stop or stops > 0,
            finish_upload=before.finish_upload or uploads > 0,
            save=before.save or saves > 0,
            loss=result.loss,
            grad_norm=result.grad_norm,
        )


def _not_finite(step: int, own_keys: list[str]) -> NotFiniteError:
    """Return an error that names the clips of the ranks whose loss is not finite; a collective."""
    keys = [key for found in distributed.all_gather_object(own_keys) for key in found]
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    found = f"among the clips {', '.join(keys[:_KEYS_NAMED])}{more}"
    advice = "look at these clips, lower optim.lr or set optim.clip_grad_norm; the weights are "
    advice += "untouched and the newest checkpoint is from before"
    return NotFiniteError("Loss is not finite", f"step {step}", found, advice)


def _gradient_not_finite(step: int) -> NotFiniteError:
    """Return the error for an update that was skipped, which all ranks see at the same step."""
    found = "a finite loss whose gradient has infinities or NaN"
    advice = "lower optim.lr or set optim.clip_grad_norm; the weights are untouched and the newest "
    advice += "checkpoint is from before"
    return NotFiniteError("Gradient is not finite", f"step {step}", found, advice)


def out_of_memory(
    train: TrainConfig, rank: int, step: int, cause: torch.OutOfMemoryError
) -> HealthError:
    """Return the error for a device that is too small, which no restart can fix.

    Args:
        train: The recipe's section.
        rank: Number of the rank.
        step: Number of the step, from 1.
        cause: torch's error.
    """
    advice = f"lower train.micro_batch_size (now {train.micro_batch_size})"
    if not train.activation_checkpointing:
        advice += ", or set train.activation_checkpointing=true"
    where, found = f"rank {rank}, step {step}", str(cause).strip().partition("\n")[0]
    return HealthError("Device is out of memory", where, found, advice)
