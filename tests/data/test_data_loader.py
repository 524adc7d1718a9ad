"""The loader: batches are a function of (seed, step), bad samples are replaced, threads end."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from loaders import (
    NO_VIDEO,
    SIZES,
    bits,
    config_of,
    cut_clips,
    kept,
    loader_of,
    order_of,
    shown,
    slots_of_epoch,
    threads,
    window_start,
)
from numbered_shards import FRAMES, SIDE

from svfap_dist.config import Config
from svfap_dist.data.masking import MASKS
from svfap_dist.data.sample_order import Slot
from svfap_dist.errors import ConfigError, HealthError, ShardError
from svfap_dist.rng import Stream
from svfap_dist.shards.reader import SampleReader
from svfap_dist.video.info import VideoInfo


def test_batches_hold_what_order_window_and_mask_say(make_data_set):
    """An oracle over two epochs and a half: every frame of every clip, and every token."""
    data_set, config = make_data_set(SIZES), config_of()
    loader = loader_of(data_set, config)
    assert loader.steps_per_epoch == 6
    for step, batch in enumerate(loader.batches(0, 15)):
        epoch, step_in_epoch = divmod(step, 6)
        order = order_of(config, SIZES, epoch)
        slots = slots_of_epoch(order, step_in_epoch)
        assert batch.slots.samples == [slot.sample for slot in slots]
        assert batch.keys == [f"clip-{slot.sample:03d}" for slot in slots]
        assert list(zip(batch.slots.lanes, batch.slots.positions, strict=True)) == [
            (slot.lane, slot.position) for slot in slots
        ]
        assert batch.frames.shape == (8, 4, 32, 32, 3)
        assert (batch.frames.dtype, batch.visible.dtype) == (torch.uint8, torch.int32)
        for row, frames in enumerate(shown(batch)):
            sample = slots[row].sample
            start = window_start(config, order, epoch, slots[row])
            assert frames == [(sample, start + 2 * k) for k in range(4)]
            split = MASKS["tube"].split(Stream(3, "mask", epoch, sample), 2, 4, 0.5)
            assert batch.visible[row].tolist() == split.visible.tolist()
            assert batch.masked[row].tolist() == split.masked.tolist()
        assert not any(batch.slots.substituted)
        assert batch.bad == []
        assert batch.fetch_seconds > 0
        assert batch.decode_seconds > 0


@pytest.mark.parametrize("repeats", [1, 2])
def test_clips_are_cut_by_streams_of_the_seed_the_epoch_and_the_sample(make_data_set, repeats):
    """An oracle over the end of an epoch and the beginning of the next, with real random crops."""
    data_set = make_data_set(SIZES)
    crops = {"crop_scales": (1.0, 0.875, 0.75, 0.66), "num_lanes": 2}
    config = config_of(repeated_sampling=repeats, **crops)
    per_epoch = loader_of(data_set, config).steps_per_epoch
    info, seen = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264"), set()
    first = per_epoch - 4
    for step, batch in enumerate(loader_of(data_set, config).batches(first, per_epoch + 4), first):
        epoch = step // per_epoch
        order = order_of(config, SIZES, epoch)
        rows = iter(batch.frames)
        for slot in zip(batch.slots.samples, batch.slots.lanes, batch.slots.positions, strict=True):
            sample, phase = slot[0], order.window_phase(*slot[1:], config.data.sampling_rate)
            window = (3, "window", epoch, sample)
            keys = [(3, "crop", epoch, sample), (3, "crop", epoch, sample, 1)][:repeats]
            clips = cut_clips(data_set.videos[sample], info, config.data, window, keys, phase)
            for clip in clips:
                assert torch.equal(next(rows), clip)
            seen.add((epoch, sample))
    assert {epoch for epoch, _ in seen} == {0, 1}
    assert {sample for epoch, sample in seen if epoch} & {s for epoch, s in seen if not epoch}


@pytest.mark.parametrize(
    "data",
    [
        {"decode_threads": 1, "prefetch_bytes": 1},
        {"decode_threads": 7, "prefetch_bytes": 1 << 20},
        {"decode_threads": 5, "decode_workers": 2},
        {"read_ahead_bytes": 50_000},  # a block in several passes
        {"read_ahead_bytes": 1},
    ],
)
def test_threads_workers_and_prefetching_change_no_bit(make_data_set, data):
    data_set = make_data_set(SIZES)
    random_crops = {"crop_scales": (1.0, 0.875, 0.75, 0.66), "frame_size": 32}
    expected = [bits(b) for b in loader_of(data_set, config_of(**random_crops)).batches(0, 9)]
    config = config_of(**random_crops, **data)
    assert [bits(b) for b in loader_of(data_set, config).batches(0, 9)] == expected


@pytest.mark.parametrize("start", [1, 5, 6, 7, 8])
def test_a_resume_changes_no_bit(make_data_set, start):
    data_set = make_data_set(SIZES)
    whole = [bits(batch) for batch in loader_of(data_set).batches(0, 9)]
    assert [bits(batch) for batch in loader_of(data_set).batches(start, 9)] == whole[start:]


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_together_make_the_batch_of_one(make_data_set, size):
    data_set = make_data_set(SIZES)
    data_set.damage(17)
    alone = [bits(batch) for batch in loader_of(data_set).batches(0, 7)]
    ranks = [kept(loader_of(data_set, rank=r, size=size).batches(0, 7)) for r in range(size)]
    for step, expected in enumerate(alone):
        assert [row for batches in ranks for row in bits(batches[step])] == expected


def repeated(repeats: int, **data) -> Config:
    return config_of(repeated_sampling=repeats, num_lanes=2, frame_size=32, **data)


def test_repeated_samples_are_clips_of_one_window(make_data_set):
    data_set, config = make_data_set(SIZES), repeated(2)
    loader = loader_of(data_set, config)
    assert loader.steps_per_epoch == 51 // 4
    for step, batch in enumerate(loader.batches(0, 14)):
        epoch, step_in_epoch = divmod(step, 12)
        order = order_of(config, SIZES, epoch)
        slots = slots_of_epoch(order, step_in_epoch)
        assert batch.slots.samples == [slot.sample for slot in slots]
        assert len(batch.frames) == len(batch.visible) == len(batch.masked) == 8
        for row, frames in enumerate(shown(batch)):
            sample, repeat = slots[row // 2].sample, row % 2
            start = window_start(config, order, epoch, slots[row // 2])
            assert frames == [(sample, start + 2 * k) for k in range(4)]
            key = (3, "mask", epoch, sample, *([repeat] if repeat else []))
            assert (
                batch.masked[row].tolist()
                == MASKS["tube"].split(Stream(*key), 2, 4, 0.5).masked.tolist()
            )


def test_repeats_differ_in_crop_and_mask_and_the_first_is_the_only_one_of_before(make_data_set):
    data_set = make_data_set(SIZES)
    crops = {"crop_scales": (1.0, 0.66)}
    (one,) = loader_of(data_set, repeated(1, **crops)).batches(0, 1)
    (four,) = loader_of(data_set, repeated(4, **crops)).batches(0, 1)
    alone = {sample: row for row, sample in enumerate(one.slots.samples)}
    shared = [
        (number, sample) for number, sample in enumerate(four.slots.samples) if sample in alone
    ]
    assert shared
    for number, sample in shared:
        for part in ("frames", "visible", "masked"):
            assert torch.equal(getattr(four, part)[4 * number], getattr(one, part)[alone[sample]])
    clips = {clip.numpy().tobytes() for clip in four.frames}
    masks = {tokens.numpy().tobytes() for tokens in four.masked}
    assert len(clips) > 2
    assert len(masks) > 2


def test_repeated_samples_are_the_same_for_every_number_of_ranks(make_data_set):
    data_set, config = make_data_set(SIZES), repeated(2)
    data_set.damage(17)
    alone = kept(loader_of(data_set, config).batches(0, 24))
    ranks = [kept(loader_of(data_set, config, rank=r, size=2).batches(0, 24)) for r in range(2)]
    for step, batch in enumerate(alone):
        for part in ("frames", "visible", "masked"):
            together = torch.cat([getattr(batches[step], part) for batches in ranks])
            assert torch.equal(getattr(batch, part), together)
        assert batch.slots.substituted == [
            s for batches in ranks for s in batches[step].slots.substituted
        ]
    assert any(any(batch.slots.substituted) for batch in alone)


def test_an_epoch_uses_each_sample_once(make_data_set):
    loader = loader_of(make_data_set([16, 24, 8]))
    samples = [
        sample
        for batch in loader.batches(0, loader.steps_per_epoch)
        for sample in batch.slots.samples
    ]
    assert sorted(samples) == list(range(48))


BAD_KINDS = {
    "damaged": None,
    "undecodable": NO_VIDEO,
    "too_short": lambda video: (video, VideoInfo(5, 25.0, SIDE, SIDE, "h264")),
    "wrong_size": lambda video: (video, VideoInfo(FRAMES, 25.0, SIDE + 2, SIDE, "h264")),
}


def with_bad(make_data_set, videos, kind: str, samples: list[int]):
    other = BAD_KINDS[kind]
    replace = {i: other(videos[i]) if callable(other) else other for i in samples if other}
    data_set = make_data_set(SIZES, replace)
    if kind == "damaged":
        for sample in samples:
            data_set.damage(sample)
    return data_set


@pytest.mark.parametrize("kind", list(BAD_KINDS))
def test_a_bad_sample_is_replaced_by_the_previous_good_one_of_its_lane(make_data_set, videos, kind):
    config = config_of()
    order = order_of(config, SIZES, 0)
    first_of_lane, in_a_row = order.sample(1, 0), [order.sample(2, 5), order.sample(2, 6)]
    data_set = with_bad(make_data_set, videos, kind, [first_of_lane, *in_a_row])
    expected = {  # slot: the position whose sample takes the place
        (1, 0): 1,  # nothing before it: the next
        (2, 5): 4,
        (2, 6): 4,
    }
    found = {}
    for batch in loader_of(data_set, config).batches(0, 6):
        for row, frames in enumerate(shown(batch)):
            slot = batch.slots.lanes[row], batch.slots.positions[row]
            sample = batch.slots.samples[row]
            assert sample == order.sample(*slot)
            assert batch.slots.substituted[row] == (slot in expected)
            if slot in expected:
                stand_in = order.sample(slot[0], expected[slot])
                start = window_start(config, order, 0, Slot(*slot, sample))
                assert frames == [(stand_in, start + 2 * k) for k in range(4)]
        found |= {bad.index: (bad.key, bad.reason) for bad in batch.bad}
        assert len(batch.bad) == sum(batch.slots.substituted)
    assert found == {i: (f"clip-{i:03d}", kind) for i in [first_of_lane, *in_a_row]}


def test_a_resume_at_a_bad_sample_changes_no_bit(make_data_set, videos):
    order = order_of(config_of(), SIZES, 0)
    bad = [order.sample(lane, position) for lane in (0, 3) for position in (4, 5, 6, 7, 8)]
    data_set = with_bad(make_data_set, videos, "undecodable", bad)
    whole = [bits(batch) for batch in loader_of(data_set).batches(0, 6)]
    for start in (2, 3, 4):
        assert [bits(b) for b in loader_of(data_set).batches(start, 6)] == whole[start:]


def test_nothing_but_bad_samples_is_an_error_that_ends_the_threads(make_data_set):
    data_set = make_data_set(SIZES, replace=dict.fromkeys(range(sum(SIZES)), NO_VIDEO))
    with pytest.raises(HealthError, match=r"in a row.*12 bad samples"):
        next(loader_of(data_set).batches(0, 6))
    assert threads() == []


def test_an_error_of_a_thread_reaches_the_consumer_and_ends_the_threads(make_data_set):
    data_set = make_data_set(SIZES)
    for entry in data_set.manifest.shards:
        os.truncate(os.path.join(data_set.url, entry.name), 5000)
    batches = loader_of(data_set).batches(0, 6)
    with pytest.raises(ShardError, match="cut short"):
        list(batches)
    assert threads() == []


def test_closing_the_batches_ends_the_threads(make_data_set):
    batches = loader_of(make_data_set(SIZES)).batches(0, 1000)
    next(batches)
    assert threads() != []
    batches.close()
    assert threads() == []


def test_an_error_of_the_consumer_ends_the_threads(make_data_set):
    def consume() -> None:
        for _ in loader_of(make_data_set(SIZES)).batches(0, 1000):
            raise RuntimeError("the consumer's own")

    with pytest.raises(RuntimeError, match="own"):
        consume()
    assert threads() == []


def test_no_more_is_prepared_than_the_batches_ahead(make_data_set, monkeypatch):
    fetch, fetched = SampleReader.fetch, []
    monkeypatch.setattr(
        SampleReader, "fetch", lambda self, i, *block: fetched.append(i) or fetch(self, i, *block)
    )
    data_set = make_data_set(SIZES)
    for batches_ahead, room in ((2, 1), (4, 4 * 8 * 4 * 32 * 32 * 3), (16, 1 << 30)):
        config = config_of(prefetch_bytes=room)
        batches = loader_of(data_set, config).batches(0, 1000)
        for _ in range(6):
            next(batches)
        batches.close()
        assert len(fetched) <= (6 + batches_ahead) * 8
        fetched.clear()


def test_no_steps_give_no_batches(make_data_set):
    assert list(loader_of(make_data_set(SIZES)).batches(4, 4)) == []


def test_a_world_that_the_lanes_do_not_allow_is_refused(make_data_set):
    with pytest.raises(ConfigError, match="ranks to one of 1, 2, 4, or"):
        loader_of(make_data_set(SIZES), size=3)


def test_a_data_set_smaller_than_a_batch_is_refused(make_data_set):
    with pytest.raises(ConfigError, match="smaller than one global batch"):
        loader_of(make_data_set([7]))


def test_batches_are_frozen(make_data_set):
    batch = next(loader_of(make_data_set(SIZES)).batches(0, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.keys = []
