"""JSON of files: written without NaN and infinities, and checked when it is read.

NaN and infinities are Python's own; other programs refuse them. What is read may be damaged or made
by anyone, so its values are checked against the fields of the dataclass that they become.
"""

from __future__ import annotations

import dataclasses
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
    for name, declared in typing.get_type_hints(type(record)).items():
        values, kind = (getattr(record, name),), declared
        if typing.get_origin(declared) is tuple:
            (values,), kind = values, typing.get_args(declared)[0]
        kind = typing.get_origin(kind) or kind  # dict[str, Any] is a dict
        for value in values:
            if type(value) is not kind:
                raise TypeError(f"{name} has a value of type {type(value).__name__}")
            if dataclasses.is_dataclass(value):
                check_types(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
