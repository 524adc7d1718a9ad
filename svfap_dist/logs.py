"""Log lines of a program on standard error: plain text, or JSON lines for a log collector.

Modules log with `logging.getLogger(__name__)`; a program calls `set_up` once: the command line, and
each rank that Ray starts. The environment variable SVFAP_LOG decides, since every child process
inherits it: a level (debug, info, warning, error), `json`, or both, as in SVFAP_LOG=debug,json.
Default: info as plain text. As a library this package configures no logging.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time

from svfap_dist.errors import ConfigError

VARIABLE = "SVFAP_LOG"

_LEVELS = ("debug", "info", "warning", "error")
_PACKAGES = ("svfap_dist", "data_sharding")


class _Handler(logging.Handler):
    """Write to what is `sys.stderr` at the time; a record with `once` only the first time."""

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if getattr(record, "once", False):
            if text in self._seen:
                return
            self._seen.add(text)
        try:
            print(self._line(record, text), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)

    def _line(self, record: logging.LogRecord, text: str) -> str:
        level = record.levelname.lower()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        if not self.as_json:
            return text if level == "info" else f"{level}: {text}"
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields = {"time": f"{when}.{int(record.msecs):03d}Z", "level": level, "logger": record.name}
        if "RANK" in os.environ:
            fields["rank"] = os.environ["RANK"]
        return json.dumps({**fields, "message": text})


def set_up(level: str = "") -> None:
    """Send the log lines of this project to standard error, as SVFAP_LOG says.

    Args:
        level: Replaces that of SVFAP_LOG, for this process and its children; empty: keep it.

    Raises:
        ConfigError: SVFAP_LOG has an unknown word.
    """
    words = [word for word in os.environ.get(VARIABLE, "").lower().split(",") if word]
    as_json = "json" in words
    if level:
        os.environ[VARIABLE] = ",".join([level, *(["json"] if as_json else [])])
    else:
        level = next((word for word in words if word in _LEVELS), "info")
    handler = _Handler(as_json)
    for package in _PACKAGES:
        logger = logging.getLogger(package)
        for old in [each for each in logger.handlers if isinstance(each, _Handler)]:
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.setLevel(level.upper())
    if unknown := [word for word in words if word not in (*_LEVELS, "json")]:
        known = ", ".join(_LEVELS)
        raise ConfigError("Unknown log setting", VARIABLE, unknown[0], f"use {known} and json")


def is_set_up() -> bool:
    """Return whether `set_up` was called in this process."""
    return any(isinstance(each, _Handler) for each in logging.getLogger(_PACKAGES[0]).handlers)


def allow_bars() -> bool:
    """Return whether a progress bar fits the log: on a terminal, with plain lines of level info.

    A terminal that cannot move its cursor (TERM=dumb) gets lines.
    """
    logger = logging.getLogger(_PACKAGES[0])
    as_json = any(isinstance(each, _Handler) and each.as_json for each in logger.handlers)
    can_move = sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    return can_move and not as_json and logger.isEnabledFor(logging.INFO)
