"""The order of a whole run: one source in its own order, mixtures in exact shares."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from labeled import balanced
from loaders import config_of, order_of, slots_of_epoch
from mixtures import mixed_manifest, mixture_of

from svfap_dist.config import Config, TrainConfig
from svfap_dist.data.run_order import RunOrder, Shares
from svfap_dist.data.selection import Selection
from svfap_dist.errors import ConfigError
from svfap_dist.shards.format import Manifest, ShardEntry

Sources = list[tuple[list[int], float]]  # sizes of the shards and weight of each
LANES = 4
WEIGHTS = st.one_of(
    st.integers(1, 9), st.sampled_from([0.1, 0.25, 1 / 3, 0.7, 2.5]), st.floats(0.01, 5)
)
SOURCES = st.lists(
    st.tuples(
        st.lists(st.integers(1, 25), min_size=1, max_size=4).filter(lambda s: sum(s) >= LANES),
        WEIGHTS,
    ),
    min_size=2,
    max_size=5,
).filter(lambda sources: sum(sum(sizes) for sizes, _ in sources) >= 5 * LANES)  # a largest step


def manifest_of(sizes: list[int]) -> Manifest:
    entries = [ShardEntry(f"shard-{i:06d}.tar", n, n, str(i), "") for i, n in enumerate(sizes)]
    return Manifest("folder", "train", 0, 61, "", tuple(entries))


def mixture(sources: Sources, per_lane: int = 2, block: int = 5) -> tuple[Config, RunOrder]:
    config = mixture_of([weight for _, weight in sources], shuffle_block=block)
    batch = TrainConfig(global_batch_size=LANES * per_lane, micro_batch_size=1)
    config = config.model_copy(update={"train": batch})
    return config, RunOrder(config, mixed_manifest([manifest_of(sizes) for sizes, _ in sources]))


@given(weights=st.lists(WEIGHTS, min_size=1, max_size=6))
def test_no_source_is_ahead_or_behind_by_one_place(weights: list[float]) -> None:
    shares = Shares(weights)
    for share, weight in zip(shares.shares, weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), abs=1e-4)
    counts = [0] * len(weights)
    for place in range(min(2 * shares.period, 3000)):
        assert counts == [shares.count(source, place) for source in range(len(weights))]
        for count, share in zip(counts, shares.shares, strict=True):
            assert abs(count - share * place) < 1
        source = shares.source(place)
        assert shares.place(source, counts[source]) == place
        counts[source] += 1


def test_shares_of_simple_weights_are_exact_in_a_short_period() -> None:
    assert Shares([3, 1]).shares == [0.75, 0.25]
    assert [Shares([0.7, 0.2, 0.1]).period, Shares([5]).period] == [10, 1]
    three = Shares([0.5, 0.3, 0.2])
    assert collections.Counter(map(three.source, range(10))) == {0: 5, 1: 3, 2: 2}


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6).filter(lambda s: sum(s) >= 8),
    version=st.sampled_from([1, 2]),
    rank=st.integers(0, 1),
)
def test_one_source_has_its_own_order(sizes: list[int], version: int, rank: int) -> None:
    config = config_of(order_version=version)
    order = RunOrder(config, manifest_of(sizes))
    for epoch in range(3):
        own = order_of(config, sizes, epoch)
        assert order.steps_per_epoch == own.steps
        for step in range(own.steps):
            found = order.slots(epoch * own.steps + step, rank, 2)
            assert found == slots_of_epoch(own, step, rank, 2)


@settings(max_examples=40, deadline=None)
@given(sources=SOURCES, per_lane=st.integers(1, 5), block=st.integers(1, 9))
def test_each_sample_of_a_source_is_used_once_in_each_of_its_epochs(
    sources: Sources, per_lane: int, block: int
) -> None:
    """Nothing is lost or duplicated, from the first step on, whatever the weights."""
    _, order = mixture(sources, per_lane, block)
    used: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    reached: dict[tuple[int, int], tuple[int, int]] = {}  # epoch and position, by source and lane
    for step in range(40):
        for slot in order.slots(step, 0, 1):
            used[slot.source, slot.epoch].append(slot.sample)
            place = slot.source, slot.lane
            epoch, position = reached.get(place, (0, -1))
            length = sum(sources[slot.source][0]) // LANES
            assert slot.epoch * length + slot.position == epoch * length + position + 1
            reached[place] = slot.epoch, slot.position
    ends = list(itertools.accumulate(sum(sizes) for sizes, _ in sources))
    for (source, epoch), samples in used.items():
        assert len(set(samples)) == len(samples)
        assert ends[source] - sum(sources[source][0]) <= min(samples)
        assert max(samples) < ends[source]
        if all(reached.get((source, lane), (0, 0))[0] > epoch for lane in range(LANES)):
            assert len(samples) > sum(sources[source][0]) - LANES  # less than one per lane left out


@settings(max_examples=40, deadline=None)
@given(sources=SOURCES, per_lane=st.integers(1, 5))
def test_shares_are_within_one_percent_and_each_steps_within_two_samples(
    sources: Sources, per_lane: int
) -> None:
    config, order = mixture(sources, per_lane)
    counts, steps = collections.Counter(), 400 // per_lane
    for step in range(steps):
        of_step = collections.Counter(slot.source for slot in order.slots(step, 0, 1))
        for source, share in enumerate(order.shares.shares):
            assert abs(of_step[source] - share * config.samples_per_step) < 2
        counts += of_step
    total = sum(weight for _, weight in sources)
    for source, (_, weight) in enumerate(sources):
        share = counts[source] / (steps * config.samples_per_step)
        assert share == pytest.approx(weight / total, abs=0.01)


def test_shares_are_exact_in_a_step_that_has_whole_periods() -> None:
    _, order = mixture([([40], 3), ([40], 1)])
    for step in range(20):
        assert sum(slot.source for slot in order.slots(step, 0, 1)) == 2  # of 8


@settings(max_examples=40, deadline=None)
@given(sources=SOURCES, steps=st.permutations(range(12)), ranks=st.sampled_from([2, 4]))
def test_a_step_is_the_same_on_any_number_of_ranks_and_after_any_resume(
    sources: Sources, steps: list[int], ranks: int
) -> None:
    _, order = mixture(sources)
    in_order = [order.slots(step, 0, 1) for step in range(12)]
    _, resumed = mixture(sources)
    for step in steps:
        parts = [resumed.slots(step, rank, ranks) for rank in range(ranks)]
        assert list(itertools.chain(*parts)) == in_order[step]


@settings(max_examples=40, deadline=None)
@given(sources=SOURCES, first=st.integers(0, 30))
def test_the_step_of_a_sample_is_known(sources: Sources, first: int) -> None:
    """What read-ahead rests on: where each lane of each source is, and when it uses a sample."""
    _, order = mixture(sources)
    seen = set()
    for step in range(first, first + 8):
        for slot in order.slots(step, 0, 1):
            source, lane = slot.source, slot.lane
            assert order.step_of(source, lane, slot.epoch, slot.position) == step
            if (source, lane) not in seen:
                seen.add((source, lane))
                expected = slot.epoch, slot.position
                assert order.next_position(source, lane, first) == expected


def test_an_epoch_of_a_mixture_has_as_many_samples_as_its_sources_together() -> None:
    _, order = mixture([([30], 1), ([7, 6], 1)])
    assert order.steps_per_epoch == 43 // 8


def test_a_selection_is_that_of_each_source() -> None:
    config = mixture_of([1, 1])
    manifest = mixed_manifest([manifest_of([10, 10]), manifest_of([10])])
    selected = np.array([1, 4, 6, 12, 13, 20, 22, 24, 26, 28])
    order = RunOrder(config, manifest, Selection(selected, np.zeros(len(selected), np.int64)))
    assert order.samples_of_groups == (5, 5)
    used = {slot.sample for step in range(8) for slot in order.slots(step, 0, 1)}
    assert used == set(selected.tolist())


def test_a_source_needs_a_sample_for_each_lane() -> None:
    with pytest.raises(ConfigError, match=r"fewer samples than there are lanes.*s1.*3 samples"):
        mixture([([30], 1), ([3], 1)])


TAIL = ([30, 17], [0] * 30 + [1] * 11 + [2] * 4)  # sizes of the shards; classes of all but two


def long_tail(**data) -> RunOrder:
    sizes, classes = TAIL
    selection = Selection(np.arange(2, 47), np.array(classes, np.int64))
    return RunOrder(balanced(config_of(**data)), manifest_of(sizes), selection)


def test_classes_have_equal_shares_and_epochs_of_their_own() -> None:
    order, counts = long_tail(), collections.Counter()
    assert order.steps_per_epoch == 45 // 8  # as without balance
    used: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for step in range(60):
        slots = order.slots(step, 0, 1)
        of_step = collections.Counter(TAIL[1][slot.sample - 2] for slot in slots)
        assert max(of_step.values()) - min(of_step.values()) <= 2, of_step
        counts += of_step
        for slot in slots:
            assert slot.source == 0
            assert TAIL[1][slot.sample - 2] == slot.group
            used[slot.group, slot.epoch].append(slot.sample)
    assert max(counts.values()) - min(counts.values()) <= 2 * LANES
    assert all(len(set(samples)) == len(samples) for samples in used.values())
    assert len({epoch for group, epoch in used if group == 2}) == 40  # 160 of four samples
    for group in range(3):
        samples = {sample for (of, _), found in used.items() if of == group for sample in found}
        assert len(samples) == TAIL[1].count(group)


@pytest.mark.parametrize("ranks", [2, 4])
def test_balanced_steps_are_the_same_on_any_number_of_ranks_and_after_any_resume(ranks) -> None:
    order = long_tail()
    in_order = [order.slots(step, 0, 1) for step in range(12)]
    resumed, seen = long_tail(), set()
    for step in (7, 3, 11, 0):
        parts = [resumed.slots(step, rank, ranks) for rank in range(ranks)]
        assert list(itertools.chain(*parts)) == in_order[step]
    for step in range(5, 12):
        for slot in in_order[step]:
            assert order.step_of(slot.group, slot.lane, slot.epoch, slot.position) == step
            if (slot.group, slot.lane) not in seen:
                seen.add((slot.group, slot.lane))
                place = slot.epoch, slot.position
                assert order.next_position(slot.group, slot.lane, 5) == place


def test_clips_are_mixed_with_clips_of_all_classes() -> None:
    """A step's clip is mixed with that at the mirrored place (`train.mixing.mix`)."""
    selection = Selection(np.arange(40), np.arange(40) % 2)
    order = RunOrder(balanced(config_of()), manifest_of([40]), selection)
    pairs = collections.Counter()
    for step in range(100):
        classes = [slot.group for slot in order.slots(step, 0, 1)]
        pairs.update(tuple(sorted(p)) for p in zip(classes[:4], classes[:3:-1], strict=True))
    assert 150 < pairs[0, 1] < 250  # of 400
    assert min(pairs[0, 0], pairs[1, 1]) > 50


def test_classes_are_balanced_in_each_source_of_a_mixture() -> None:
    manifest = mixed_manifest([manifest_of([20]), manifest_of([12])])
    classes = np.array([0] * 14 + [1] * 6 + [1] * 4 + [2] * 8, np.int64)
    config = balanced(mixture_of([3, 1]))
    order = RunOrder(config, manifest, Selection(np.arange(32), classes))
    assert order.samples_of_sources == (20, 12)
    counts = collections.Counter(
        (slot.source, int(classes[slot.sample])) for n in range(80) for slot in order.slots(n, 0, 1)
    )
    expected = {(0, 0): 240, (0, 1): 240, (1, 1): 80, (1, 2): 80}
    assert counts == pytest.approx(expected, abs=2 * LANES)  # a lane may end within a period


def test_a_balanced_class_needs_a_sample_for_each_lane() -> None:
    with pytest.raises(
        ConfigError, match=r"(?s)Class has too few.*third.*4 samples.*at most 4.*class_weights"
    ):
        long_tail(num_lanes=8)
