"""Per-step consensus of all ranks, read one step late, and what follows from a bad step.

Each rank reports whether it has a reason to stop, whether its upload has ended, and how many of its
samples were bad. The engine adds these numbers over all ranks together with the loss and the norm
of the gradient, and the device leaves the weights as they are if one of those is not finite, so no
host has to wait for the sums: they are read when the next step is already in the device's queue, or
at once where something depends on them. Every rank reads the same sums and decides the same.

`health.max_skipped` updates in a row may be left out. After one more, or at a spike of the loss if
the recipe says so, all ranks return to the newest checkpoint (`RollbackError`) and pass over the
steps that led there: they are counted, and compute nothing. When that does not help
`health.max_rollbacks` times, the run ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from svfap_dist import distributed
from svfap_dist.config import HealthConfig, TrainConfig
from svfap_dist.errors import HealthError, SvfapError
from svfap_dist.train.spikes import Spike, SpikeDetector
from svfap_dist.train.update import Update, UpdateResult

_MIN_SAMPLES = 1000  # lower bound of the denominator, so that a few early bad samples may pass
_KEYS_NAMED = 8  # of each step, in an error
_KEYS_KEPT = 256  # of each step, in an event
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch's RuntimeErrors


class NotFiniteError(HealthError):
    """A loss or gradient has infinities or NaN."""


class RollbackError(Exception):
    """All ranks return to the newest checkpoint and pass over some steps.

    Args:
        step: The last step that was taken, from 1.
        passed_over: The steps to pass over.
        cause: Error that ends the run if it may not return any more.
    """

    def __init__(self, step: int, passed_over: Sequence[int], cause: HealthError) -> None:
        self.step, self.passed_over, self.cause = step, tuple(passed_over), cause
        super().__init__(f"{cause.what} at {cause.where}")


@dataclasses.dataclass(frozen=True)
class Skip:
    """An update that was left out.

    keys: of the clips concerned, those of all ranks for a gradient; only the first ones of many.
    num_clips: number of all clips concerned.
    """

    step: int
    part: str  # that is not finite: loss or gradient
    keys: tuple[str, ...]
    num_clips: int


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

    completed: steps whose outcome is known, of the whole run. skipped: updates just left out, in a
    row.

    Args:
        config: The recipe's section.
        max_bad_fraction: Share of bad samples above which the run ends.
        completed: Steps before this attempt.
        rollbacks: Earlier ones that count; see `HealthConfig.max_rollbacks`.
    """

    def __init__(
        self,
        config: HealthConfig,
        max_bad_fraction: float,
        completed: int = 0,
        rollbacks: int = 0,
    ) -> None:
        self._config, self._max_bad_fraction = config, max_bad_fraction
        self.completed, self._rollbacks = completed, rollbacks
        self._all_seen = self._all_bad = 0.0  # samples of all ranks so far
        self._pending: list[_Pending] = []
        self.skipped: list[Skip] = []
        self._spikes = SpikeDetector(config.spike_zscore, config.spike_window)
        self._events: list[Skip | Spike] = []
        self._by_source: list[tuple[float, float]] = []  # of the steps since `take_by_source`

    def add(self, step: int, keys: Callable[[], list[str]], update: Update) -> None:
        """Add a step that is queued on the device.

        Args:
            step: Number of the step, from 1.
            keys: Returns the keys of this rank's clips; called if its loss is not finite.
            update: Its update, with the `counts` of this rank's vote.
        """
        self._pending.append(_Pending(step, keys, update))

    def take_events(self) -> list[Skip | Spike]:
        """Return what happened in the steps decided so far and was not returned yet."""
        events, self._events = self._events, []
        return events

    def take_by_source(self) -> list[tuple[float, float]]:
        """Return the sum of the losses of each source's clips, and their number, since last time.

        They are of the clips of all ranks in the steps decided so far; without a mixture, [].
        """
        sums, self._by_source = self._by_source, []
        return sums

    def decide(self, up_to_now: bool, before: StepDecision = NOTHING) -> StepDecision:
        """Return the decision of all ranks, and drop the steps that it covers.

        Args:
            up_to_now: Whether to wait for the newest step; otherwise only steps before it count.
            before: A decision to add to.

        Raises:
            RollbackError: On every rank, if too many losses or gradients in a row are not finite,
                or the loss spikes.
            HealthError: On every rank, if that happens again and again, or too many samples are
                bad.
        """
        while len(self._pending) > (0 if up_to_now else 1):
            before = self._add_votes(before, self._pending.pop(0))
        return before

    def _add_votes(self, before: StepDecision, pending: _Pending) -> StepDecision:
        result = pending.update.read()
        bad, seen, stops, uploads, saves = result.counts
        self._all_bad += bad
        self._all_seen += seen
        if self._all_bad > self._max_bad_fraction * max(self._all_seen, _MIN_SAMPLES):
            found = f"{self._all_bad:.0f} of {self._all_seen:.0f} samples, more than "
            found += f"data.max_bad_fraction = {self._max_bad_fraction}"
            do = "see quarantine.jsonl of the run for keys and reasons; try `svfap shards verify`"
            raise HealthError("Too many bad samples", "data.url", found, do)
        if result.applied:
            self._check_spike(pending.step, result.loss)
            self.skipped = []
            before_it = self._by_source or [(0.0, 0.0)] * len(result.by_source)
            self._by_source = [
                (loss + sums[0], clips + sums[1])
                for (loss, clips), sums in zip(before_it, result.by_source, strict=True)
            ]
        else:
            self._skip(pending, result)
        self.completed = pending.step
        return StepDecision(
            stop=before.stop or stops > 0,
            finish_upload=before.finish_upload or uploads > 0,
            save=before.save or saves > 0,
            loss=result.loss,
            grad_norm=result.grad_norm,
        )

    def _skip(self, pending: _Pending, result: UpdateResult) -> None:
        """Note that an update was left out, and roll back after too many; a collective."""
        is_loss = not result.losses_are_finite
        own = pending.keys() if not (is_loss and result.own_loss_is_finite) else []
        gathered = distributed.all_gather_object((own[:_KEYS_KEPT], len(own)))
        keys = [key for some, _ in gathered for key in some][:_KEYS_KEPT]
        count = sum(number for _, number in gathered)
        skip = Skip(pending.step, "loss" if is_loss else "gradient", tuple(keys), count)
        self._events.append(skip)
        self.skipped.append(skip)
        if len(self.skipped) > self._config.max_skipped:
            self._roll_back([each.step for each in self.skipped], _not_finite(self.skipped))

    def _check_spike(self, step: int, loss: float) -> None:
        spike = self._spikes.add(step, loss)
        if spike is None:
            return
        self._events.append(spike)
        if self._config.spike_action == "roll back":
            found = f"{loss:.4g}, {spike.zscore:.1f} deviations above {spike.median:.4g}"
            advice = "lower optim.lr or set optim.clip_grad_norm; the newest checkpoint "
            advice += "predates the spike"
            self._roll_back([step], HealthError("Loss spikes", f"step {step}", found, advice))

    def _roll_back(self, steps: list[int], cause: HealthError) -> None:
        if self._rollbacks >= self._config.max_rollbacks:
            raise cause
        raise RollbackError(steps[-1], steps, cause)


def _not_finite(skipped: Sequence[Skip]) -> NotFiniteError:
    """Return the error of updates left out in a row, which names the clips of each."""
    last = skipped[-1]
    found = "; ".join(
        f"step {skip.step}: {_named(skip)}" if len(skipped) > 1 else _named(skip)
        for skip in skipped
    )
    advice = "look at these clips, lower optim.lr or set optim.clip_grad_norm; the weights are "
    advice += "unchanged, and the newest checkpoint predates these steps"
    where = f"step {last.step}"
    if len(skipped) > 1:
        where = f"steps {skipped[0].step} to {last.step}"
    return NotFiniteError(f"{last.part.capitalize()} is not finite", where, found, advice)


def _named(skip: Skip) -> str:
    more = f" and {skip.num_clips - _KEYS_NAMED} more" if skip.num_clips > _KEYS_NAMED else ""
    what = "" if skip.part == "loss" else "the gradient, with finite losses, "
    return f"{what}among the clips {', '.join(skip.keys[:_KEYS_NAMED])}{more}"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error is of a device or host without enough memory.

    Args:
        error: Any error.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def failure_of(error: Exception) -> str:
    """Return a rank's own failure as one line, to recognize it when it comes again.

    Args:
        error: What ends the attempt.

    Returns:
        "" for errors that say themselves whether a retry can succeed, and for those of collectives,
        which fail because another rank did.
    """
    text = f"{type(error).__name__}: {str(error) or repr(error)}".partition("\n")[0]
    is_of_peer = isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)
    )
    return "" if is_of_peer or isinstance(error, SvfapError) else text


def fails_again(step: int, failure: str) -> HealthError:
    """Return the error for a failure that an earlier attempt had at the same step.

    Args:
        step: Completed steps.
        failure: What `failure_of` returned.
    """
    what, where = "Training fails again at the same step", f"step {step + 1}"
    advice = "see the stop events of events.jsonl and the rank's log; for errors of memory or CUDA "
    advice += "lower train.micro_batch_size"
    return HealthError(what, where, failure, advice)


def out_of_memory(train: TrainConfig, rank: int, step: int, cause: BaseException) -> HealthError:
    """Return the error for too little memory, which no restart can fix.

    Args:
        train: The recipe's section.
        rank: Number of the rank.
        step: Number of the step, from 1.
        cause: Python's or torch's error.
    """
    where, found = f"rank {rank}, step {step}", str(cause).strip().partition("\n")[0]
    is_of_host = not (isinstance(cause, torch.OutOfMemoryError) or "CUDA" in found)
    title = "Host is out of memory" if is_of_host else "Device is out of memory"
    advice = f"lower train.micro_batch_size (now {train.micro_batch_size})"
    if is_of_host:
        advice += ", data.decode_workers or data.prefetch_bytes"
    if not train.activation_checkpointing:
        advice += ", or set train.activation_checkpointing=true"
    return HealthError(title, where, found or type(cause).__name__, advice)
