"""What is read as text, and what is written as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import pytest

from svfap_dist import json_text
from svfap_dist.report import page
from svfap_dist.telemetry.journal import encode_lines
from svfap_dist.text_file import decode_text


def strictly(text: str | bytes):
    """What a parser reads that refuses Python's own NaN and Infinity."""
    return json.loads(text, parse_constant=pytest.fail)


def test_json_has_no_numbers_that_are_not_finite():
    value = {"a": (1.5, math.nan, [math.inf, 3]), "b": {"c": -math.inf}, "d": "é", "e": None}
    found = strictly(json_text.dumps(value))
    assert found == {"a": [1.5, None, [None, 3]], "b": {"c": None}, "d": "é", "e": None}
    assert json_text.dumps({"a": 0.1}) == json.dumps({"a": 0.1})
    assert json_text.dumps([1], indent=1) == json.dumps([1], indent=1)


def test_a_loss_that_is_not_finite_is_null_in_a_runs_files_and_nan_when_read(tmp_path):
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": math.nan}, {"message": None}]
    (tmp_path / "metrics.jsonl").write_bytes(encode_lines(rows))
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert [strictly(line).get("loss") for line in lines] == [0.5, None, None]
    first, second, third = page.read_lines(str(tmp_path / "metrics.jsonl"))
    assert first == rows[0]
    assert math.isnan(second["loss"])
    assert third == rows[2]


def test_declared_types_are_resolved_once_for_all_records(monkeypatch):
    """Otherwise a manifest of 100,000 shards takes 50 times as long to check."""

    @dataclasses.dataclass
    class Point:
        name: str
        values: tuple[int, ...]

    resolved: list[type] = []
    resolve = typing.get_type_hints
    monkeypatch.setattr(
        typing, "get_type_hints", lambda kind: resolved.append(kind) or resolve(kind)
    )
    for number in range(3):
        json_text.check_types(Point("a", (number, 1)))
    assert resolved == [Point]
    with pytest.raises(TypeError, match="values has a value of type str"):
        json_text.check_types(Point("a", (1, "b")))  # type: ignore[arg-type]


def test_text_without_a_mark_or_with_one():
    for encoding in ("utf-8", "utf-8-sig"):
        assert decode_text("é=1\r\n".encode(encoding)) == "é=1\r\n"
    assert decode_text(b"") == ""
    with pytest.raises(ValueError, match=r"line 2 has the byte 0x80, which is not UTF-8$"):
        decode_text(b"a\n\x80")
