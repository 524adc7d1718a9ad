"""Spikes of the loss: a loss far above those before it, by a robust z-score.

In: losses, one per step, as the host reads them. Out: how far each is above the median of those
before it, in robust standard deviations. Nothing here waits for a device.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
from collections.abc import Sequence

_DEVIATIONS_PER_MAD = 1.4826  # standard deviation of a normal distribution over its MAD
_LEAST_DEVIATION = 1e-3  # of the median: losses that hardly change would make anything a spike


@dataclasses.dataclass(frozen=True)
class Spike:
    """A loss far above those before it."""

    step: int
    loss: float
    median: float
    zscore: float


def robust_zscore(value: float, before: Sequence[float]) -> float:
    """Return how far a value is above the median, in units of the scaled MAD.

    Args:
        value: The newest value.
        before: Values before it; at least one.
    """
    median = statistics.median(before)
    mad = statistics.median(abs(each - median) for each in before)
    deviation = max(_DEVIATIONS_PER_MAD * mad, _LEAST_DEVIATION * abs(median))
    return (value - median) / deviation if deviation else 0.0


class SpikeDetector:
    """Judges each loss by those before it.

    Args:
        limit: z-score from which on a loss is a spike; 0: none is.
        window: Losses before it that count. No loss is judged before half as many are known.
    """

    def __init__(self, limit: float, window: int) -> None:
        self._limit, self._min_losses = limit, window // 2
        self._losses: collections.deque[float] = collections.deque(maxlen=window)
        self._is_high = False  # the last loss was too high, too

    def add(self, step: int, loss: float) -> Spike | None:
        """Return the spike that begins at this loss, if one does.

        Args:
            step: Number of the step, from 1.
            loss: Its finite loss, mean over all ranks.
        """
        if not self._limit:
            return None
        spike = None
        if len(self._losses) >= self._min_losses:
            zscore = robust_zscore(loss, self._losses)
            if zscore >= self._limit and not self._is_high:
                spike = Spike(step, loss, statistics.median(self._losses), zscore)
            self._is_high = zscore >= self._limit
        self._losses.append(loss)
        return spike
