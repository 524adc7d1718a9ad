"""Manifests and indexes that are damaged or made by anyone: a valid object, or our own error."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hostile import HOSTILE_TARS, pax_member, value_or_our_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import (
    BadSample,
    Manifest,
    PackedSample,
    ShardEntry,
    ShardIndex,
)

NUMBERS = st.integers() | st.floats() | st.booleans()
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | NUMBERS | st.text(max_size=5) | st.sampled_from(["shard-000000.tar", "../x.tar"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
RAW = st.binary(max_size=20) | st.sampled_from([b"[" * 100_000, b"null", b"{}", b"1" * 9999])
MANIFEST = Manifest("folder", "source", 0, 16, "d", (ShardEntry("a.tar", 2, 100, "s", "i"),))
INDEX = ShardIndex(("a", "b"), (0, 50), (50, 50), ("x", "y"), (16, 20))


@st.composite
def changed(draw: Callable[..., Any], document: dict[str, Any]) -> bytes:
    """A document of which some parts are missing, are new or have another value."""
    document = json.loads(json.dumps(document))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = document
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from([*keys, "new"]) if keys else st.just("new"))
            if key not in keys or not isinstance(place[key], dict | list) or draw(st.booleans()):
                break
            place = place[key]
        if isinstance(place, list) and key == "new":
            place.append(draw(VALUES))
        elif key != "new" and draw(st.booleans()):
            del place[key]
        else:
            place[key] = draw(VALUES)
    return json.dumps(document).encode()


def manifests() -> st.SearchStrategy[bytes]:
    """Manifests whose fingerprint is right, as far as there can be one."""

    def sign(raw: bytes) -> bytes:
        fields = json.loads(raw)
        try:
            rows = [(row["name"], row["num_samples"], row["sha256"]) for row in fields["shards"]]
            fields["fingerprint"] = shard_format.digest(json.dumps(rows).encode())
        except (TypeError, LookupError):
            pass
        return json.dumps(fields).encode()

    document = json.loads(shard_format.dump(MANIFEST))
    return RAW | changed(document).map(sign) | st.just(shard_format.dump(MANIFEST))


def indexes() -> st.SearchStrategy[bytes]:
    return RAW | changed(dataclasses.asdict(INDEX))


def check_manifest(folder: Path, raw: bytes) -> None:
    (folder / "manifest.json").write_bytes(raw)
    found = value_or_our_error(lambda: shard_format.load_manifest(str(folder)), ShardError)
    if found is not None:
        assert all(isinstance(row.num_samples, int) for row in found.shards)
        assert not any("/" in row.name for row in found.shards)
        assert re.fullmatch("[0-9a-f]{16}", found.fingerprint)
        shard_format.dump(found)


def check_index(folder: Path, raw: bytes) -> None:
    (folder / "a.index.json").write_bytes(raw)
    entry = dataclasses.replace(MANIFEST.shards[0], index_sha256=hashlib.sha256(raw).hexdigest())
    found = value_or_our_error(lambda: shard_format.load_index(str(folder), entry), ShardError)
    if found is not None:
        for row in range(len(found.keys)):
            assert all(offset >= 0 and size > 0 for offset, size in found.ranges(row))
        shard_format.dump(found)


def fuzz(check: Callable[[Path, bytes], None], raws: st.SearchStrategy[bytes], folder: Path,
         examples: int) -> None:  # fmt: skip
    slow = list(HealthCheck)
    run = given(raws)(lambda raw: check(folder, raw))
    settings(max_examples=examples, suppress_health_check=slow, database=None)(run)()


LONG = [pytest.mark.slow, pytest.mark.timeout(900)]
CASES = {"manifest": (check_manifest, manifests()), "index": (check_index, indexes())}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=LONG)])
def test_any_document_is_valid_or_our_error(name: str, examples: int, tmp_path: Path) -> None:
    fuzz(*CASES[name], tmp_path, examples)


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/b.tar", "shard-0", ""])
def test_a_shard_outside_the_data_set_is_refused(name: str, tmp_path: Path) -> None:
    entry = dataclasses.replace(MANIFEST.shards[0], name=name)
    raw = shard_format.dump(dataclasses.replace(MANIFEST, shards=(entry,)))
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(ShardError, match=r"Unreadable manifest.*shard name"):
        shard_format.load_manifest(str(tmp_path))


@pytest.mark.parametrize("name", HOSTILE_TARS)
def test_a_hostile_member_is_a_damaged_tar(name: str) -> None:
    """Sizes are as anyone can write them: none is allocated, and no header is read twice."""
    whole = pax_member("a.json", b"{}")
    packed = PackedSample(3, "a", "row 3", whole + HOSTILE_TARS[name])
    with pytest.raises(tarfile.ReadError):
        list(shard_format.iter_members(packed.data))
    found = shard_format.unpack(packed)
    assert isinstance(found, BadSample)
    assert found.reason == "malformed"


def test_two_members_of_one_name_are_no_sample() -> None:
    twice = pax_member("a.json", b"{}") * 2 + pax_member("a.mp4", b"x")
    with pytest.raises(tarfile.ReadError, match="two members json of sample 'a'"):
        list(shard_format.iter_samples(twice))


def test_names_that_lead_elsewhere_are_only_names() -> None:
    names = ["../a.json", "/etc/b.json"]
    data = b"".join(pax_member(name, b"{}") for name in names)
    assert [name for name, _ in shard_format.iter_members(data)] == names
