"""Shards of f84d50d can be read, verified and extended."""

from __future__ import annotations

from typing import Any

import pytest
from alike import differences


@pytest.mark.parametrize("shards", ["videos", "train", "labelled"])
def test_shards_are_whole_and_hold_what_they_held(
    shards: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    for verb in ("verify", "show"):
        name = f"{verb} {shards}"
        assert now["commands"][name]["code"] == 0, now["stderr"][name]
        assert differences(now["commands"][name], then["commands"][name]) == []


@pytest.mark.parametrize("name", ["shard videos", "shard train"])
def test_the_same_command_finds_the_data_set_complete(
    name: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    assert now["commands"][name]["code"] == 0, now["stderr"][name]
    assert now["commands"][name]["printed"]["already_complete"]
    assert differences(now["commands"][name], then["commands"][name]) == []


def test_new_clips_go_into_a_shard_of_their_own(now: dict[str, Any], then: dict[str, Any]) -> None:
    grown = now["commands"]["shard more"]
    assert grown["code"] == 0, now["stderr"]["shard more"]
    assert grown["printed"]["new_samples"] == 2
    assert grown["printed"]["num_shards"] == 3
    before = then["commands"]["verify labelled"]["printed"]["fingerprint"]
    assert grown["printed"]["fingerprint_before"] == before
    checked = now["commands"]["verify more"]
    assert checked["code"] == 0, now["stderr"]["verify more"]
    assert checked["printed"]["num_samples"] == 10
