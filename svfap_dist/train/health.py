"""What all ranks must agree on before a step's weights are touched: no rank decides alone.

Each rank brings its own view: was it asked to stop, is its loss finite, has its upload ended, how
many of its samples were bad. One small sum over all ranks, then every rank knows the same and does
the same. The vote waits for the device once a step, which costs nothing more: DeepSpeed's ZeRO
waits there anyway, to see whether the gradient is finite.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist import distributed
from svfap_dist.errors import HealthError

_FEWEST_SAMPLES = (
    1000  # bad samples are counted against at least so many: a few early ones may pass
)
_KEYS_NAMED = 8


class NotFiniteError(HealthError):
    """A loss or gradient has infinities or NaN."""


@dataclasses.dataclass(frozen=True)
class Wishes:
    """What one rank wants all to do after a step."""

    stop: bool = False  # save and end: it was asked to
    settle: bool = False  # settle the checkpoint upload in flight: it knows how that ended
    look: bool = False  # look whether nodes will leave: it is time to


@dataclasses.dataclass(frozen=True)
class Verdict(Wishes):
    """What all ranks agreed on at a step: every wish that some rank has."""

    loss: float = 0.0  # of the step, mean over all ranks


class Health:
    """Votes of one rank."""

    def __init__(self, device: torch.device, max_bad_fraction: float) -> None:
        self._device = device
        self._max_bad_fraction = max_bad_fraction
        self._all_seen = self._all_bad = 0.0  # samples of all ranks so far

    def agree(
        self, step: int, keys: list[str], num_bad: int, loss: Tensor, wishes: Wishes
    ) -> Verdict:
        """Vote on a step; all ranks call it together.

        Args:
            step, keys, num_bad, loss: this rank's clips, how many were bad, and their mean loss.
            wishes: what it wants all to do after the step.

        Raises: HealthError on every rank if a loss is not finite or too many samples are bad.
        """
        wanted = (wishes.stop, wishes.settle, wishes.look)
        views = torch.tensor([num_bad, len(keys), *wanted], dtype=torch.float64)
        finite = torch.isfinite(loss)
        views = torch.cat([views.to(self._device), torch.stack([~finite, loss]).double()])
        dist.all_reduce(views)
        bad, seen, stops, settles, looks, broken, total = views.tolist()
        if broken:
            raise _not_finite(step, [] if bool(finite) else keys)
        self._all_bad += bad
        self._all_seen += seen
        if self._all_bad > self._max_bad_fraction * max(self._all_seen, _FEWEST_SAMPLES):
            raise self._too_many_bad()
        mean = total / dist.get_world_size()
        return Verdict(stop=stops > 0, settle=settles > 0, look=looks > 0, loss=mean)

    def _too_many_bad(self) -> HealthError:
        return HealthError(
            "Too many samples cannot be used",
            where="data.url",
            found=f"{self._all_bad:.0f} of {self._all_seen:.0f} samples, more than "
            f"data.max_bad_fraction = {self._max_bad_fraction}",
            do="see quarantine.jsonl of the run for keys and reasons; try `svfap shards verify`",
        )


def _not_finite(step: int, own_keys: list[str]) -> NotFiniteError:
    """Names the clips of the ranks whose loss is bad; all ranks call it together."""
    keys = [key for found in distributed.all_gather_object(own_keys) for key in found]
    more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
    return NotFiniteError(
        "Loss is not finite",
        where=f"step {step}",
        found=f"among the clips {', '.join(keys[:_KEYS_NAMED])}{more}",
        do="look at these clips, lower optim.lr or set optim.clip_grad_norm; the weights are "
        "untouched and the newest checkpoint is from before",
    )


def gradient_not_finite(step: int) -> NotFiniteError:
    """The error for an update that DeepSpeed left out; all ranks see it at the same step."""
    return NotFiniteError(
        "Gradient is not finite",
        where=f"step {step}",
        found="a finite loss whose gradient has infinities or NaN",
        do="lower optim.lr or set optim.clip_grad_norm; the weights are untouched and the newest "
        "checkpoint is from before",
    )
