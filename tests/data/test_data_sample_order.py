"""The order of samples in an epoch: each once, as the slow oracle says, from any step on."""

from __future__ import annotations

import hashlib
import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import slots_of_epoch

from svfap_dist.data.sample_order import EpochOrder, steps_per_epoch
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream


def shift_of(lane: int, block: int) -> int:
    """How much shorter the first block of a lane is: the lane's bits behind the binary point."""
    fraction, place = 0.0, 0.5
    while lane:
        fraction, lane, place = fraction + place * (lane % 2), lane // 2, place / 2
    return int(fraction * block)


def oracle(sizes, seed, epoch, batch, lanes, block, version=1):
    """All lanes of an epoch as lists of samples, by doing what the design says, one by one."""
    samples, first = [], 0
    for size in sizes:
        samples.append(list(range(first, first + size)))
        first += size
    laid = [
        s for shard in Stream(seed, "shards", epoch).permutation(len(sizes)) for s in samples[shard]
    ]
    turn = Stream(seed, "turn", epoch).integer(len(laid))
    laid = laid[turn:] + laid[:turn]
    length = len(laid) // batch * batch // lanes
    cut = [laid[lane * length : (lane + 1) * length] for lane in range(lanes)]
    for lane, content in enumerate(cut):
        shuffled = []
        first = -shift_of(lane, block) if version == 2 else 0
        for number, start in enumerate(range(first, length, block)):
            part = content[max(start, 0) : start + block]
            order = Stream(seed, "block", epoch, lane, number).permutation(len(part))
            shuffled += [part[i] for i in order]
        cut[lane] = shuffled
    return cut


@st.composite
def epochs(draw):
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    batch = lanes * draw(st.integers(1, 3))
    sizes = draw(
        st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda s: sum(s) >= batch)
    )
    return {
        "sizes": sizes,
        "seed": draw(st.integers(0, 3)),
        "epoch": draw(st.integers(0, 3)),
        "batch": batch,
        "lanes": lanes,
        "block": draw(st.integers(1, 20)),
        "version": draw(st.sampled_from([1, 2])),
    }


def order_of(case) -> EpochOrder:
    return EpochOrder(
        case["sizes"],
        seed=case["seed"],
        epoch=case["epoch"],
        global_batch_size=case["batch"],
        num_lanes=case["lanes"],
        shuffle_block=case["block"],
        version=case["version"],
    )


RECORDED = [
    {"sizes": [13, 20, 8, 10], "seed": 3, "batch": 8, "lanes": 4, "block": 5},
    {"sizes": [993] * 7, "seed": 0, "batch": 96, "lanes": 24, "block": 64},
    {"sizes": [40, 1, 0, 77], "seed": 1, "batch": 6, "lanes": 3, "block": 16, "every": 3},
]


@pytest.mark.parametrize(
    ("version", "digests"),
    [
        # Of the code of before there were versions, commit f84d50d.
        (1, ["e8b78f0ca166f35d", "468db40c4207021e", "199d7634f0e73865"]),
        (2, ["0bb2315f396dd792", "d1adaa138381d06f", "b1ae2b15fb0f9cf3"]),
    ],
)
def test_orders_are_those_that_were_recorded(version, digests):
    """Runs that began with an earlier release resume in their order."""
    for case, expected in zip(RECORDED, digests, strict=True):
        seen = hashlib.sha256()
        for epoch in range(3):
            every = case.get("every")
            order = EpochOrder(
                case["sizes"],
                seed=case["seed"],
                epoch=epoch,
                global_batch_size=case["batch"],
                num_lanes=case["lanes"],
                shuffle_block=case["block"],
                selected=np.arange(0, sum(case["sizes"]), every) if every else None,
                version=version,
            )
            for step in range(order.steps):
                slots = slots_of_epoch(order, step)
                seen.update(repr([(s.lane, s.position, s.sample) for s in slots]).encode())
        assert seen.hexdigest()[:16] == expected


@given(epochs())
@settings(max_examples=150)
def test_equals_the_slow_oracle(case):
    order, expected = order_of(case), oracle(**case)
    for lane, content in enumerate(expected):
        assert [order.sample(lane, position) for position in range(len(content))] == content


@given(epochs())
@settings(max_examples=100)
def test_every_sample_at_most_once_and_only_the_tail_never(case):
    order = order_of(case)
    seen = [slot.sample for step in range(order.steps) for slot in slots_of_epoch(order, step)]
    assert len(set(seen)) == len(seen) == order.steps * case["batch"]
    assert set(seen) <= set(range(sum(case["sizes"])))
    assert sum(case["sizes"]) - len(seen) < case["batch"]


@given(epochs(), st.data())
@settings(max_examples=60)
def test_a_step_does_not_depend_on_what_was_asked_before(case, data):
    used, fresh = order_of(case), order_of(case)
    for step in data.draw(st.lists(st.integers(0, used.steps - 1), max_size=5)):
        slots_of_epoch(used, step)
    step = data.draw(st.integers(0, used.steps - 1))
    assert slots_of_epoch(used, step) == slots_of_epoch(fresh, step)


@given(epochs(), st.integers(1, 8))
@settings(max_examples=60)
def test_windows_of_a_block_share_a_phase(case, stride):
    order = order_of(case)
    for lane in range(case["lanes"]):
        phases = [order.window_phase(lane, p, stride) for p in range(order.lane_length)]
        if case["version"] == 1:
            assert set(phases) == {None}
            continue
        assert set(phases) <= set(range(stride))
        first = case["block"] - shift_of(lane, case["block"])
        starts = [0, *range(first, order.lane_length, case["block"]), order.lane_length]
        parts = [phases[start:stop] for start, stop in itertools.pairwise(starts)]
        assert all(len(set(part)) <= 1 for part in parts)


def test_phases_are_equally_likely():
    order = EpochOrder(
        [993] * 40, seed=0, epoch=0, global_batch_size=64, num_lanes=64, shuffle_block=4, version=2
    )
    lanes = range(64)
    found = [order.window_phase(lane, p, 4) for lane in lanes for p in range(0, 600, 4)]
    assert all(2200 < found.count(phase) < 2600 for phase in range(4))  # of 9,600


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16, 32])
def test_blocks_of_a_ranks_lanes_begin_at_steps_that_are_spread_evenly(ranks):
    order = EpochOrder(
        [993] * 1100, seed=0, epoch=0, global_batch_size=256, num_lanes=64, shuffle_block=512,
        version=2,
    )  # fmt: skip
    count = 64 // ranks
    for rank in range(ranks):
        lanes = range(rank * count, (rank + 1) * count)
        begins = [order.block(lane, 1).start for lane in lanes]
        assert sorted((begin - 1) // (512 // count) for begin in begins) == list(range(count))


def left_out(sizes, epoch):
    order = EpochOrder(
        sizes, seed=0, epoch=epoch, global_batch_size=8, num_lanes=2, shuffle_block=4
    )
    used = {slot.sample for step in range(order.steps) for slot in slots_of_epoch(order, step)}
    return frozenset(range(sum(sizes))) - used


@pytest.mark.parametrize("sizes", [[39], [10, 10, 10, 9]])
def test_the_tail_left_out_differs_by_epoch_even_with_one_shard(sizes):
    tails = [left_out(sizes, epoch) for epoch in range(12)]
    assert all(len(tail) == 7 for tail in tails)
    assert len(set(tails)) > 6
    assert len(frozenset.union(*tails)) > 7


def test_seeds_and_epochs_give_other_orders():
    def first(seed, epoch):
        order = EpochOrder(
            [50] * 4, seed=seed, epoch=epoch, global_batch_size=20, num_lanes=4, shuffle_block=16
        )
        return [slot.sample for slot in slots_of_epoch(order, 0)]

    assert first(0, 0) == first(0, 0)
    assert len({tuple(first(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@settings(max_examples=30)
@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.integers(1, 4), st.data())
def test_selected_samples_are_in_the_order_of_a_data_set_without_the_others(sizes, lanes, data):
    wanted = [sample for sample in range(sum(sizes)) if data.draw(st.booleans(), label="wanted")]
    shards = itertools.pairwise(itertools.accumulate(sizes, initial=0))
    fewer = [sum(begin <= sample < end for sample in wanted) for begin, end in shards]
    if len(wanted) < lanes:
        return
    expected = oracle(fewer, 3, 1, lanes, lanes, 5)
    shape = {"epoch": 1, "global_batch_size": lanes, "num_lanes": lanes, "shuffle_block": 5}
    order = EpochOrder(sizes, seed=3, **shape, selected=np.array(wanted))
    for lane, places in enumerate(expected):
        found = [order.sample(lane, position) for position in range(order.lane_length)]
        assert found == [wanted[place] for place in places]


def test_steps_per_epoch_counts_full_batches_only():
    assert steps_per_epoch(1_092_009, 256) == 4265
    assert steps_per_epoch(8, 8) == 1


def test_fewer_samples_than_a_batch_is_refused_with_a_remedy():
    with pytest.raises(ConfigError) as caught:
        steps_per_epoch(7, 8)
    assert caught.value.where == "train.global_batch_size"
    assert "7" in caught.value.found
    assert "7" in caught.value.do


def test_paper_size_costs_no_work_in_proportion_to_the_data():
    """1.09 M samples in 1,100 shards: taking an epoch up in its middle is a matter of moments."""
    sizes = [993] * 1100
    began = time.process_time()
    for epoch in range(10):
        order = EpochOrder(
            sizes, seed=0, epoch=epoch, global_batch_size=256, num_lanes=64, shuffle_block=1024
        )
        assert len(slots_of_epoch(order, order.steps // 2, 3, 8)) == 32
    # Shuffling a million samples ten times over would take more than a second.
    assert time.process_time() - began < 0.5
