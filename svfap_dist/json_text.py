"""JSON of files: written without NaN and infinities, and checked when it is read.

NaN and infinities are Python's own; other programs refuse them. What is read may be damaged or made
by anyone, so its values are checked against the fields of the dataclass that they become.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing
from typing import Any


def dumps(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON; numbers that are not finite become null.

    Args:
        value: What `json.dumps` takes.
        indent: Spaces of a level; None: one line.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), indent=indent, allow_nan=False)


def loads(data: bytes) -> Any:
    """Return the value of a JSON document.

    Args:
        data: The document, UTF-8.

    Raises:
        ValueError: It is none, or is nested too deeply.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_types(record: Any) -> None:
    """Check that the fields of a dataclass have the types that it declares.

    Args:
        record: Of fields that are int, str, dict, other such dataclasses, or tuples of one of them.

    Raises:
        TypeError: A field has another type; it is named.
    """
    for name, kind, is_tuple in _fields(type(record)):
        value = getattr(record, name)
        for part in value if is_tuple else (value,):
            if type(part) is not kind:
                raise TypeError(f"{name} has a value of type {type(part).__name__}")
            if dataclasses.is_dataclass(part):
                check_types(part)


@functools.cache  # resolving annotations takes 50 times as long as a check
def _fields(record: type) -> list[tuple[str, type, bool]]:
    """Return name and type of a dataclass's fields, for tuples that of their parts and True."""
    found = []
    for name, declared in typing.get_type_hints(record).items():
        is_tuple = typing.get_origin(declared) is tuple
        kind = typing.get_args(declared)[0] if is_tuple else declared
        found.append((name, typing.get_origin(kind) or kind, is_tuple))  # dict[str, Any] is a dict
    return found


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
