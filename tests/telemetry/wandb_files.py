"""Read what W&B keeps of an offline run: a log of LevelDB's format, of its own messages."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError

_BLOCK = 32768
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _chunks(data: bytes) -> Iterator[tuple[int, bytes]]:
    place = struct.calcsize("<4sHB")  # of the file's header
    while place + 7 <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if not kind:
            return
        yield kind, data[place + 7 : place + 7 + length]
        place += 7 + length


def records(path: Path) -> list[Any]:
    """The messages of a .wandb file."""
    from wandb.proto import wandb_internal_pb2

    found, parts = [], b""
    for kind, chunk in _chunks(path.read_bytes()):
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            found.append(wandb_internal_pb2.Record.FromString(parts))
    return found


def wait_until_written(path: Path, seconds: float = 60.0) -> None:
    """Wait for the last message: W&B's process writes it a little after a run has ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(DecodeError):  # half a message
            if any(r.WhichOneof("record_type") == "exit" for r in records(path)):
                return
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end after {seconds} s")


def history(path: Path) -> list[dict[str, Any]]:
    """The rows that were logged."""
    return [
        {
            "/".join(item.nested_key) or item.key: json.loads(item.value_json)
            for item in r.history.item
        }
        for r in records(path)
        if r.WhichOneof("record_type") == "history"
    ]
