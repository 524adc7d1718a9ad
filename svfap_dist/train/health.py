"""Per-step consensus of all ranks by one all-reduce, before a step changes the weights.

Each rank contributes whether it has a reason to stop, whether its loss is finite, whether its
upload has ended, and how many of its samples were bad. After one small sum over all ranks, every
rank takes the same decision. The vote makes the host wait for the device once per step, at no extra
cost: DeepSpeed's ZeRO waits there anyway, to see whether the gradient is finite.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist import distributed
from svfap_dist.config import TrainConfig
from svfap_dist.errors import HealthError

_MIN_SAMPLES = 1000  # lower bound of the denominator, so that a few early bad samples may pass
_KEYS_NAMED = 8


class NotFiniteError(HealthError):
    """A loss or gradient has infinities or NaN."""


@dataclasses.dataclass(frozen=True)
class StepVote:
    """What one rank wants all to do after a step."""

    stop: bool = False  # save and stop
    finish_upload: bool = False  # collect the outcome of the checkpoint upload, which has ended
    check_nodes: bool = False  # check whether nodes will be taken away


@dataclasses.dataclass(frozen=True)
class StepDecision(StepVote):
    """What all ranks do after a step: whatever at least one voted for."""

    loss: float = 0.0  # of the step, mean over all ranks


class Health:
    """Votes of one rank.

    Args:
        device: Device of the losses and of the collective.
        max_bad_fraction: Share of bad samples above which the run ends.
    """

    def __init__(self, device: torch.device, max_bad_fraction: float) -> None:
        self._device = device
        self._max_bad_fraction = max_bad_fraction
        self._all_seen = self._all_bad = 0.0  # samples of all ranks so far

    def agree(
        self, step: int, keys: list[str], num_bad: int, loss: Tensor, vote: StepVote
    ) -> StepDecision:
        """Vote on a step; a collective.

        Args:
            step: Number of the step, from 1.
            keys: Keys of this rank's clips.
            num_bad: Number of its bad samples.
            loss: Its mean loss, a scalar on the device.
            vote: What it wants all to do after the step.

        Raises:
            HealthError: On every rank, if a loss is not finite or too many samples are bad.
        """
        wanted = (vote.stop, vote.finish_upload, vote.check_nodes)
        views = torch.tensor([num_bad, len(keys), *wanted], dtype=torch.float64)
        finite = torch.isfinite(loss)
        views = torch.cat([views.to(self._device), torch.stack([~finite, loss]).double()])
        dist.all_reduce(views)
        bad, seen, stops, uploads, checks, broken, total = views.tolist()
        if broken:
            raise _not_finite(step, [] if bool(finite) else keys)
        self._all_bad += bad
        self._all_seen += seen
        if self._all_bad > self._max_bad_fraction * max(self._all_seen, _MIN_SAMPLES):
            found = f"{self._all_bad:.0f} of {self._all_seen:.0f} samples, more than "
            found += f"data.max_bad_fraction = {self._max_bad_fraction}"
            do = "see quarantine.jsonl of the run for keys and reasons; try `svfap shards verify`"
            raise HealthError("Too many bad samples", "data.url", found, do)
        mean = total / dist.get_world_size()
        return StepDecision(
            stop=stops > 0, finish_upload=uploads > 0, check_nodes=checks > 0, loss=mean
        )


def _not_finite(step: int, own_keys: list[str]) -> NotFiniteError:
    """Return an error that names the clips of the ranks whose loss is not finite; a collective."""
    keys = [key for found in distributed.all_gather_object(own_keys) for key in found]
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    found = f"among the clips {', '.join(keys[:_KEYS_NAMED])}{more}"
    advice = "look at these clips, lower optim.lr or set optim.clip_grad_norm; the weights are "
    advice += "untouched and the newest checkpoint is from before"
    return NotFiniteError("Loss is not finite", f"step {step}", found, advice)


def gradient_not_finite(step: int) -> NotFiniteError:
    """Return the error for an update that was skipped, which all ranks see at the same step.

    Args:
        step: Number of the step, from 1.
    """
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
