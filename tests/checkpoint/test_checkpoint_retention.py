from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.checkpoint.store import steps_to_delete


@given(
    steps=st.lists(st.integers(1, 300), unique=True),
    keep_last=st.integers(1, 5),
    keep_every=st.integers(0, 50),
)
def test_exactly_the_newest_and_every_nth_stay(
    steps: list[int], keep_last: int, keep_every: int
) -> None:
    gone = steps_to_delete(steps, keep_last, keep_every)
    assert gone == sorted(set(gone))
    assert set(gone) <= set(steps)
    for step in steps:
        newer = sum(other > step for other in steps)
        stays = newer < keep_last or (keep_every > 0 and step % keep_every == 0)
        assert (step in gone) != stays


@given(steps=st.lists(st.integers(1, 300), unique=True, min_size=1), keep_last=st.integers(1, 5))
def test_deleting_again_deletes_nothing_more(steps: list[int], keep_last: int) -> None:
    left = set(steps) - set(steps_to_delete(steps, keep_last, 0))
    assert max(steps) in left
    assert steps_to_delete(left, keep_last, 0) == []
