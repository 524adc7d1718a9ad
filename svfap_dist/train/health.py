"""What all ranks must agree on before a step's weights are touched: no rank decides alone.

Each rank brings its own view: was it asked to stop, is its loss finite, has its upload ended, how
many of its samples were bad. One small sum over all ranks, then every rank knows the same and does
the same. On a GPU the losses stay on the device until a vote is due; meanwhile DeepSpeed leaves out
any update whose gradient is not finite, so the weights are safe.
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


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What all ranks agreed on at a step."""

    loss: float  # of the step, mean over all ranks
    stop: bool  # some rank was asked to stop
    settle: bool  # some rank knows the end of the checkpoint upload in flight


class Health:
    """Votes of one rank."""

    def __init__(self, device: torch.device, max_bad_fraction: float) -> None:
        self._device = device
        self._max_bad_fraction = max_bad_fraction
        self._unchecked: list[tuple[int, list[str], Tensor]] = []  # step, keys, loss
        self._seen = self._bad = 0  # since the last vote, on this rank
        self._all_seen = self._all_bad = 0.0  # up to the last vote, on all ranks

    def note(self, step: int, keys: list[str], num_bad: int, loss: Tensor) -> None:
        """Remember a step of this rank: its clips, how many of them were bad, and its mean loss."""
        self._unchecked.append((step, keys, loss))
        self._seen += len(keys)
        self._bad += num_bad

    def agree(self, stop: bool, settle: bool) -> Verdict:
        """Vote on everything noted since the last vote; all ranks call it together.

        Raises: HealthError on every rank if a loss is not finite or too many samples are bad.
        """
        losses = torch.stack([loss for *_, loss in self._unchecked]).double()
        views = torch.tensor([stop, settle, self._bad, self._seen], dtype=torch.float64)
        views = torch.cat(
            [
                views.to(self._device),
                (~torch.isfinite(losses)).sum().double().reshape(1),
                losses[-1:],
            ]
        )
        dist.all_reduce(views)
        stops, settles, bad, seen, broken, loss = views.tolist()
        if broken:
            raise self._not_finite()
        self._unchecked.clear()
        self._seen = self._bad = 0
        self._all_bad += bad
        self._all_seen += seen
        if self._all_bad > self._max_bad_fraction * max(self._all_seen, _FEWEST_SAMPLES):
            raise self._too_many_bad()
        return Verdict(loss / dist.get_world_size(), stops > 0, settles > 0)

    def _not_finite(self) -> HealthError:
        """Names the first step with a bad loss and the clips of the ranks that had it."""
        mine = [(step, keys) for step, keys, loss in self._unchecked if not torch.isfinite(loss)]
        everyones = [entry for entries in distributed.gathered(mine) for entry in entries]
        first = min(step for step, _ in everyones)
        keys = [key for step, found in everyones if step == first for key in found]
        more = f" and {len(keys) - _KEYS_NAMED} more" if len(keys) > _KEYS_NAMED else ""
        return HealthError(
            "Loss is not finite",
            where=f"step {first}",
            found=f"among the clips {', '.join(keys[:_KEYS_NAMED])}{more}",
            do="look at these clips, lower optim.lr or set optim.clip_grad_norm; the weights are "
            "untouched and the newest checkpoint is from before",
        )

    def _too_many_bad(self) -> HealthError:
        return HealthError(
            "Too many samples cannot be used",
            where="data.url",
            found=f"{self._all_bad:.0f} of {self._all_seen:.0f} samples, more than "
            f"data.max_bad_fraction = {self._max_bad_fraction}",
            do="see quarantine.jsonl of the run for keys and reasons; try `svfap shards verify`",
        )


def gradient_not_finite(step: int) -> HealthError:
    """The error for an update that DeepSpeed left out; all ranks see it at the same step."""
    return HealthError(
        "Gradient is not finite",
        where=f"step {step}",
        found="a finite loss whose gradient has infinities or NaN",
        do="lower optim.lr or set optim.clip_grad_norm; the weights are untouched and the newest "
        "checkpoint is from before",
    )
