"""Errors in four parts: what failed, where, what was found there, and what to do about it.

Every failure that a user or the environment can cause is one of these classes. Each class has an
exit code, which shells and schedulers see, and says whether a retry can succeed. `assert` checks
our own invariants only.

The four parts may be given by position or by name:

    raise ConfigError("Missing required setting", "data.url", "it is empty", "set data.url")
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What a command's exit code means, for `svfap --help`; docs/commands.md has the same table.
EXIT_CODES = {
    0: "done",
    1: "a check found something (audit, sweep, dashboards --check), or an unexpected error",
    2: "command line, recipe or environment",
    3: "shards",
    4: "video",
    5: "checkpoint, including a full disk while one is saved",
    6: "ranks, job or cluster",
    7: "unhealthy run: non-finite loss, too many bad samples, fenced by a newer process",
    8: "storage: credentials, missing bucket, full disk, network",
    9: "a check of svfap doctor failed",
    75: "train.max_seconds reached and a checkpoint saved: run the same command again",
}
SIGNAL_EXIT_CODE = "128 + N"
SIGNAL_EXIT_MEANING = "signal N (Ctrl-C: 130, SIGTERM: 143); training saves a checkpoint first"


class SvfapError(Exception):
    """Base class of all errors that are shown to users.

    Args:
        what: Name of the failure: a short sentence without a full stop.
        where: File, URL, recipe key or rank concerned.
        found: The value or state that caused it.
        do: What the user can change or run.
    """

    exit_code = 1
    retryable = False  # whether the same call, unchanged, can succeed later

    def __init__(self, what: str, where: str = "", found: str = "", do: str = "") -> None:
        self.what, self.where, self.found, self.do = what, where, found, do
        labeled = (("Where", where), ("Found", found), ("Do", do))
        parts = [what, *(f"{label}: {text}" for label, text in labeled if text)]
        super().__init__(" ".join(part if part[-1] in ".?!" else f"{part}." for part in parts))

    def __reduce__(self) -> tuple[object, ...]:
        # The default would pickle the joined message alone, and lose the parts between ranks.
        return type(self), (self.what, self.where, self.found, self.do)


class ConfigError(SvfapError):
    """Invalid recipe, override, command line or environment."""

    exit_code = 2


class ShardError(SvfapError):
    """Shards or a manifest that are missing, damaged, or do not belong together."""

    exit_code = 3


class DecodeError(SvfapError):
    """A video that cannot be decoded."""

    exit_code = 4
    reason = "undecodable"  # one word of a short list, for counting


class CheckpointError(SvfapError):
    """A checkpoint that cannot be written, found or loaded."""

    exit_code = 5


class ClusterError(SvfapError):
    """Ranks, ports or a cluster that cannot be started or reached."""

    exit_code = 6
    retryable = True


class HealthError(SvfapError):
    """A run that must stop: non-finite loss, too many bad samples, a decoder that hangs."""

    exit_code = 7


class StorageError(SvfapError):
    """A failed storage request: wrong credentials, missing bucket, full disk, no network."""

    exit_code = 8


def nearest(word: str, known: Iterable[str]) -> str:
    """Return advice for a name that does not exist: the name that was meant, or all there are.

    Args:
        word: The unknown name.
        known: The names that exist.
    """
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]}?" if close else f"use one of {', '.join(names)}"
