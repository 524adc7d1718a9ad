"""Randomness by name: every random number is a pure function of a key, never of what was drawn
before.

`Stream(seed, "mask", epoch, sample)` always yields the same numbers, in any process, in any order
of calls, so a resumed or resized run draws what the undisturbed one would have drawn. Only the raw
64-bit output of the Philox counter generator is used: NumPy promises that stream for ever, which it
does not for its distributions (NEP 19).
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np

_STANDARD_NORMAL = NormalDist()


class Stream:
    """Random numbers for one key; the key may mix integers and strings."""

    def __init__(self, *key: int | str) -> None:
        digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64))

    def uniform(self) -> float:
        """A float in [0, 1)."""
        return int(self._bits.random_raw() >> 11) * 2.0**-53

    def integer(self, stop: int) -> int:
        """An integer in [0, stop)."""
        return int(self._bits.random_raw()) * stop >> 64

    def permutation(self, length: int) -> np.ndarray:
        """The integers 0..length-1 in random order, int64."""
        return np.argsort(self._bits.random_raw(length), kind="stable")

    def words(self, count: int) -> np.ndarray:
        """`count` integers in [0, 65536), uint16."""
        return self._bits.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]

    def normal(self) -> float:
        """A float of the standard normal distribution: the quantile of a uniform one."""
        return _STANDARD_NORMAL.inv_cdf((int(self._bits.random_raw() >> 11) + 0.5) * 2.0**-53)

    def beta(self, alpha: float, beta: float) -> float:
        """A float in [0, 1] of the beta distribution; both parameters positive."""
        one, other = self._gamma(alpha), self._gamma(beta)
        # Both are 0 only where parameters are so small that all weight is at the two ends.
        return one / (one + other) if one + other else float(self.integer(2))

    def _gamma(self, shape: float) -> float:
        """A float of the gamma distribution with scale 1.

        Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000.
        """
        if shape < 1:
            return self._gamma(shape + 1) * self.uniform() ** (1 / shape)
        d = shape - 1 / 3
        while True:
            x = self.normal()
            v = (1 + x / math.sqrt(9 * d)) ** 3
            # 1 - uniform: of (0, 1], so that it has a logarithm
            if v > 0 and math.log(1 - self.uniform()) < x * x / 2 + d - d * v + d * math.log(v):
                return d * v
