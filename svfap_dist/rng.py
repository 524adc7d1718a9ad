"""Keyed randomness: every random number is a pure function of a key, not of earlier draws.

`Stream(seed, "mask", epoch, sample)` yields the same numbers in any process and any order of calls,
so a resumed or resized run draws what an uninterrupted one would have drawn. Only the raw 64-bit
output of the Philox counter generator is used: NumPy guarantees that stream for good, but not its
distributions (NEP 19).
"""

from __future__ import annotations

import hashlib
import math
from statistics import NormalDist

import numpy as np

_STANDARD_NORMAL = NormalDist()


def digest(*key: int | str) -> np.ndarray:
    """Return the digest of a stream's key, uint64 [2], which represents the key in arrays.

    Args:
        key: Integers and strings.
    """
    hashed = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.frombuffer(hashed, dtype=np.uint64)


class Stream:
    """Random numbers of one key.

    Args:
        key: Integers and strings.
    """

    def __init__(self, *key: int | str) -> None:
        self._bits = np.random.Philox(key=digest(*key))

    @classmethod
    def of_digest(cls, words: np.ndarray) -> Stream:
        """Return the stream of the key that has a digest.

        Args:
            words: From `digest`.
        """
        stream = cls.__new__(cls)
        stream._bits = np.random.Philox(key=words)
        return stream

    def uniform(self) -> float:
        """Return a float in [0, 1)."""
        return int(self._bits.random_raw() >> 11) * 2.0**-53

    def integer(self, stop: int) -> int:
        """Return an integer in [0, stop).

        Args:
            stop: At least 1.
        """
        return int(self._bits.random_raw()) * stop >> 64

    def permutation(self, length: int) -> np.ndarray:
        """Return the integers 0..length-1 in random order, int64.

        Args:
            length: How many.
        """
        return np.argsort(self._bits.random_raw(length), kind="stable")

    def words(self, count: int) -> np.ndarray:
        """Return integers in [0, 65536), uint16.

        Args:
            count: How many.
        """
        return self._bits.random_raw(-(-count // 4)).astype("<u8").view("<u2")[:count]

    def normal(self) -> float:
        """Return a standard normal float: the quantile of a uniform one."""
        return _STANDARD_NORMAL.inv_cdf((int(self._bits.random_raw() >> 11) + 0.5) * 2.0**-53)

    def beta(self, alpha: float, beta: float) -> float:
        """Return a float in [0, 1] of the beta distribution.

        Args:
            alpha: First shape parameter, positive.
            beta: Second shape parameter, positive.
        """
        one, other = self._gamma(alpha), self._gamma(beta)
        # Both underflow to 0 only for tiny parameters, whose distribution is all at the two ends.
        return one / (one + other) if one + other else float(self.integer(2))

    def _gamma(self, shape: float) -> float:
        """Return a float of the gamma distribution with scale 1.

        Source: Marsaglia and Tsang, "A simple method for generating gamma variables", 2000.
        """
        if shape < 1:
            return self._gamma(shape + 1) * self.uniform() ** (1 / shape)
        d = shape - 1 / 3
        while True:
            x = self.normal()
            v = (1 + x / math.sqrt(9 * d)) ** 3
            # 1 - uniform is in (0, 1], so it has a logarithm.
            if v > 0 and math.log(1 - self.uniform()) < x * x / 2 + d - d * v + d * math.log(v):
                return d * v
