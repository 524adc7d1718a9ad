"""Read what W&B keeps of an offline run: a log of LevelDB's format, of its own messages."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
