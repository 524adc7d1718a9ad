"""Errors that say what went wrong, where, what was found, and what to do about it.

Every error that a user can cause, or that the world around us causes, is one of these classes. Each
class has an exit code (what a shell or a scheduler sees) and says whether trying the same thing
again can help. `assert` is kept for our own invariants.
"""

from __future__ import annotations


class SvfapError(Exception):
    """Base of all errors shown to users.

    Args:
        what: what went wrong, a short sentence without a full stop.
        where: file, URL, key or rank concerned.
        found: what was seen there.
        do: what the user can do about it.
    """

    exit_code = 1
    retryable = False  # does the same call have a chance to succeed later, unchanged?

    def __init__(self, what: str, *, where: str = "", found: str = "", do: str = "") -> None:
        self.what, self.where, self.found, self.do = what, where, found, do
        parts = [what]
        for label, text in (("Where", where), ("Found", found), ("Do", do)):
            if text:
                parts.append(f"{label}: {text}")
        super().__init__(" ".join(part if part[-1] in ".?!" else f"{part}." for part in parts))

    def __reduce__(
        self,
    ):  # keyword-only arguments: the default pickling would lose them between ranks
        fields = {"where": self.where, "found": self.found, "do": self.do}
        return _rebuild, (type(self), self.what, fields)


def _rebuild(cls: type[SvfapError], what: str, fields: dict[str, str]) -> SvfapError:
    return cls(what, **fields)


class ConfigError(SvfapError):
    """A recipe, an override or a command line that cannot be obeyed."""

    exit_code = 2


class ShardError(SvfapError):
    """Shards or a manifest that are missing, damaged, or do not belong together."""

    exit_code = 3


class DecodeError(SvfapError):
    """A video that cannot be turned into frames."""

    exit_code = 4


class CheckpointError(SvfapError):
    """A checkpoint that cannot be written, found or loaded."""

    exit_code = 5


class ClusterError(SvfapError):
    """Ranks, ports or a cluster that cannot be started or reached."""

    exit_code = 6
    retryable = True


class HealthError(SvfapError):
    """A run that would go on to no purpose: non-finite loss, too many bad samples."""

    exit_code = 7


class StorageError(SvfapError):
    """A store that refuses or cannot be reached: wrong credentials, no such bucket, no space, no
    network.

    It stands beside the classes of the rooms because every room meets it and none can mend it.
    """

    exit_code = 8
