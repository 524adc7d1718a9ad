"""Randomness by name: every random number is a pure function of a key, never of what was drawn
before.

`Stream(seed, "mask", epoch, sample)` always yields the same numbers, in any process, in any order
of calls, so a resumed or resized run draws what the undisturbed one would have drawn. Only the raw
64-bit output of the Philox counter generator is used: NumPy promises that stream for ever, which it
does not for its distributions (NEP 19).
"""

from __future__ import annotations

import hashlib

import numpy as np


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
