"""Which video goes into which shard, against a slow way to say it."""

from __future__ import annotations

import functools
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_sharding.plan import Plan
from data_sharding.sources import SourceVideo
from svfap_dist.errors import ShardError


def video(number: int, size: int = 0, stamp: str = "") -> SourceVideo:
    return SourceVideo(
        f"v{number}", functools.partial(bytes, 1), {}, "x", stamp=stamp, num_bytes=size
    )


def slow_groups(sizes: list[int], seed: int, max_samples: int, max_bytes: int) -> list[list[str]]:
    """What the plan has to say, in memory and by hand."""
    numbers = sorted(
        range(len(sizes)), key=lambda n: hashlib.sha256(f"{seed}/v{n}".encode()).digest()
    )
    groups: list[list[int]] = []
    for number in numbers:
        if groups and len(groups[-1]) < max_samples:
            total = sum(2048 + sizes[n] for n in [*groups[-1], number])
            if total <= max_bytes:
                groups[-1].append(number)
                continue
        groups.append([number])
    return [[f"v{number}" for number in group] for group in groups]


@given(
    sizes=st.lists(st.integers(0, 9000), max_size=20),
    seed=st.integers(0, 3),
    max_samples=st.integers(1, 5),
    max_bytes=st.integers(1000, 20000),
)
def test_groups_are_those_of_the_slow_way(
    sizes: list[int], seed: int, max_samples: int, max_bytes: int
) -> None:
    with Plan(seed, max_samples, max_bytes) as plan:
        assert plan.read(video(n, size) for n, size in enumerate(sizes)) in (len(sizes), -1)
        groups = list(plan.new_groups(3))
    assert [list(group.keys) for group in groups] == slow_groups(
        sizes, seed, max_samples, max_bytes
    )
    assert [group.number for group in groups] == list(range(3, 3 + len(groups)))


def test_the_digest_knows_videos_and_options_but_not_the_order_of_listing() -> None:
    def digest(videos: list[SourceVideo], **options: object) -> str:
        with Plan(0, 9, 9) as plan:
            plan.read(videos)
            return plan.digest(options)

    base = digest([video(0), video(1)], a=1)
    assert digest([video(1), video(0)], a=1) == base
    assert digest([video(0), video(1)], a=2) != base
    assert digest([video(0), video(1, stamp="other")], a=1) != base
    assert digest([video(0)], a=1) != base


def test_old_videos_stay_where_they_are_and_their_changes_are_told() -> None:
    with Plan(0, 2, 10**9) as plan:
        plan.read(video(number) for number in range(5))
        (first, *rest) = plan.new_groups(0)
        plan.keep(first.keys, first.digests)
        assert plan.changes() == ""
        assert [group.keys for group in plan.new_groups(1)] == [group.keys for group in rest]
        again = plan.group(0, first.keys)
        assert (again.keys, again.digests) == (first.keys, first.digests)
        plan.keep(["gone", rest[0].keys[0]], ["1", "2"])
        example = min("gone", rest[0].keys[0])
        assert plan.changes() == (
            f"1 of its videos are gone from the source and 1 have changed, such as {example!r}"
        )
        plan.forget()
        assert [group.keys for group in plan.new_groups(0)] == [first.keys, *(g.keys for g in rest)]


def test_equal_keys_are_refused() -> None:
    with Plan(0, 1, 1) as plan, pytest.raises(ShardError, match=r"same key.*Found: key "):
        plan.read([video(1), video(1)])
