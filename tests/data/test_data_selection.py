"""Training on some samples of a labeled set: the right ones, each clip with its own target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from labeled import INFO, balanced, selection_of, target_of, task_config
from loaders import NO_VIDEO, SIZES, bits, config_of, cut_clips, kept, shown, slots_of_epoch, world
from numbered_shards import FRAMES

from svfap_dist.config import AugmentConfig, Config
from svfap_dist.data.augment import augment
from svfap_dist.data.clips import random_window_start
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.sample_order import EpochOrder
from svfap_dist.data.selection import Selection, labels_of
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.rng import Stream, digest
from svfap_dist.video.info import VideoInfo

TRAIN = [sample for sample in range(51) if sample % 5]  # 40 samples: 5 steps of 8
RANDOM = {"crop_scales": (1.0, 0.875, 0.75, 0.66)}


def loader_of(data_set, config: Config, samples=TRAIN, rank=0, size=1) -> ClipLoader:
    place = world(rank, size)
    return ClipLoader(config, data_set.url, data_set.manifest, place, selection_of(samples))


def seen(batch) -> list[tuple]:
    return list(zip(bits(batch), batch.targets.tolist(), strict=True))


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_target_is_that_of_the_video_in_the_frames(make_data_set, repeats):
    """Also where a bad sample has a substitute, which is one of the selection, too."""
    bad = [*range(6, 12), 33, 34]
    data_set = make_data_set(SIZES, dict.fromkeys(bad, NO_VIDEO))
    data_set.damage(21)
    lanes = 4 // repeats
    loader = loader_of(data_set, task_config(repeated_sampling=repeats, num_lanes=lanes))
    assert loader.steps_per_epoch == 5 * repeats
    slots, replaced = [], 0
    for batch in loader.batches(0, loader.steps_per_epoch):
        clips = shown(batch)
        assert batch.targets.dtype == torch.int64
        assert batch.visible.shape == batch.masked.shape == (8, 0)
        assert [target_of(frames[0][0]) for frames in clips] == batch.targets.tolist()
        assert {sample for frames in clips for sample, _ in frames} <= set(TRAIN)
        own = [sample for sample in batch.slots.samples for _ in range(repeats)]
        assert [o for o, f in zip(own, clips, strict=True) if f[0][0] != o] == [
            sample
            for sample, substituted in zip(
                batch.slots.samples, batch.slots.substituted, strict=True
            )
            for _ in range(repeats)
            if substituted
        ]
        slots += batch.slots.samples
        replaced += sum(batch.slots.substituted)
    assert sorted(slots) == TRAIN
    assert replaced == len({*bad, 21} & set(TRAIN))


def test_values_are_targets_too(make_data_set):
    data_set, config = make_data_set(SIZES), task_config()
    values = np.stack([np.array(TRAIN), -np.array(TRAIN)], axis=1).astype(np.float32)
    selection = Selection(np.array(TRAIN), values)
    loader = ClipLoader(config, data_set.url, data_set.manifest, world(), selection)
    (batch,) = loader.batches(0, 1)
    assert batch.targets.tolist() == [[sample, -sample] for sample in batch.slots.samples]


def test_clips_of_a_task_are_augmented_by_a_stream_of_their_slot(make_data_set, videos):
    """Also those of substitutes, which bring their targets, while streams stay the slot's."""
    config = task_config(AugmentConfig(), **RANDOM)
    order = EpochOrder(
        SIZES, seed=3, epoch=1, global_batch_size=8, num_lanes=4, shuffle_block=5,
        selected=np.array(TRAIN), version=2,
    )  # fmt: skip
    stand_ins = {order.sample(1, 2): order.sample(1, 1)}
    data_set = make_data_set(SIZES, dict.fromkeys(stand_ins, NO_VIDEO))
    for step, batch in enumerate(loader_of(data_set, config).batches(5, 8)):
        assert batch.slots.samples == [slot.sample for slot in slots_of_epoch(order, step)]
        shown = [stand_ins.get(sample, sample) for sample in batch.slots.samples]
        assert batch.targets.tolist() == [target_of(sample) for sample in shown]
        for slot, sample, clip in zip(batch.slots.samples, shown, batch.frames, strict=True):
            window, crop = (3, "window", 1, slot), (3, "crop", 1, slot)
            (cut,) = cut_clips(videos[sample], INFO, config.data, window, [crop])
            expected = augment(cut.numpy(), Stream(3, "augment", 1, slot), config.augment)
            assert clip.numpy().tobytes() == expected.tobytes()


def test_neither_workers_nor_resume_nor_ranks_change_a_bit(make_data_set):
    data_set = make_data_set(SIZES)
    data_set.damage(17)
    config = task_config(AugmentConfig(), **RANDOM)
    whole = [seen(batch) for batch in loader_of(data_set, config).batches(0, 6)]
    with_worker = task_config(AugmentConfig(), **RANDOM, decode_workers=1, decode_threads=3)
    assert [seen(batch) for batch in loader_of(data_set, with_worker).batches(3, 6)] == whole[3:]
    ranks = [kept(loader_of(data_set, config, rank=r, size=2).batches(0, 6)) for r in (0, 1)]
    for step, expected in enumerate(whole):
        assert [row for batches in ranks for row in seen(batches[step])] == expected


def test_a_sample_of_a_rare_class_is_repeated_with_other_crops(make_data_set):
    """Whatever the ranks, and after a resume; substitutes are of the same class."""
    data_set = make_data_set(SIZES)
    data_set.damage(44)
    config = balanced(task_config(AugmentConfig(), **RANDOM))
    classes = np.digitize(range(51), [37, 46])  # the last has 5 samples

    def batches(rank=0, size=1, start=0):
        place = world(rank, size)
        selection = Selection(np.arange(51), classes)
        loader = ClipLoader(config, data_set.url, data_set.manifest, place, selection)
        assert loader.steps_per_epoch == 51 // 8
        return loader.batches(start, 6)

    whole, clips = [], {}
    for batch in batches():
        whole.append(seen(batch))
        assert batch.targets.tolist() == [classes[sample] for sample in batch.slots.samples]
        for sample, clip in zip(batch.slots.samples, batch.frames, strict=True):
            clips.setdefault(sample, []).append(clip.numpy().tobytes())
    repeated = [found for sample, found in clips.items() if classes[sample] == 2]
    assert sum(map(len, repeated)) == 16
    assert all(len(set(found)) == len(found) > 1 for found in repeated)
    assert [seen(batch) for batch in batches(start=4)] == whole[4:]
    ranks = [kept(batches(rank, 2)) for rank in (0, 1)]
    for step, expected in enumerate(whole):
        assert [row for of_rank in ranks for row in seen(of_rank[step])] == expected


def test_for_the_device_clips_come_unchanged_with_digests_of_their_streams(make_data_set):
    """The digests are the slots' own, however many ranks, threads and clips per sample."""
    data_set = make_data_set(SIZES)
    data_set.damage(17)
    device = AugmentConfig(run_on="device")
    layout = {"repeated_sampling": 2, "num_lanes": 2, **RANDOM}
    config = task_config(device, **layout)
    assert config.augments_on_device
    plain = kept(loader_of(data_set, task_config(**layout)).batches(10, 12))
    found = kept(loader_of(data_set, config).batches(10, 12))
    for batch, other in zip(found, plain, strict=True):
        assert other.digests is None
        assert torch.equal(batch.frames, other.frames)
        assert torch.equal(batch.targets, other.targets)
        slots = batch.slots.samples
        keys = [(3, "augment", 1, slot, *end) for slot in slots for end in ((), (1,))]
        expected = np.stack([digest(*key) for key in keys])
        assert np.array_equal(batch.digests.numpy().view(np.uint64), expected)
        drawn = [Stream.of_digest(words).words(9).tolist() for words in expected]
        assert drawn == [Stream(*key).words(9).tolist() for key in keys]
    threads = task_config(device, **layout, decode_threads=3)
    ranks = [kept(loader_of(data_set, threads, rank=r, size=2).batches(10, 12)) for r in (0, 1)]
    for step, batch in enumerate(found):
        of_ranks = torch.cat([batches[step].digests for batches in ranks])
        assert torch.equal(of_ranks, batch.digests)


def test_all_samples_selected_are_the_batches_without_selection(make_data_set):
    data_set, config = make_data_set(SIZES), config_of()
    plain = ClipLoader(config, data_set.url, data_set.manifest, world())
    selected = loader_of(data_set, config, range(51))
    for batch, other in zip(plain.batches(0, 7), selected.batches(0, 7), strict=True):
        assert batch.targets is None
        assert bits(batch) == bits(other)


def test_a_short_video_goes_on_with_its_last_frame(make_data_set, videos):
    """Window of 7 frames, every second of them, of videos that end after 1 to 6 frames."""
    lengths = {sample: 1 + sample % 6 for sample in range(0, 51, 3)}
    short = {
        sample: (videos[sample], dataclasses.replace(INFO, num_frames=length))
        for sample, length in lengths.items()
    }
    data_set = make_data_set(SIZES, short)
    for batch in loader_of(data_set, task_config(), range(51)).batches(0, 6):
        assert batch.bad == []
        for sample, frames in zip(batch.slots.samples, shown(batch), strict=True):
            last = lengths.get(sample, FRAMES) - 1
            start = random_window_start(Stream(3, "window", 0, sample), max(last + 1, 7), 7)
            assert frames == [(sample, min(start + 2 * k, last)) for k in range(4)]
            assert sample not in lengths or start == 0


def test_a_selection_smaller_than_a_batch_is_refused(make_data_set):
    with pytest.raises(ConfigError, match="8 samples per step, 7 to train on"):
        loader_of(make_data_set(SIZES), task_config(), TRAIN[:7])


@pytest.mark.parametrize(
    ("section", "key", "value"), [("decode", "backend", "dali"), ("data", "colors", "device")]
)
def test_clips_of_a_task_are_not_made_on_the_device(make_data_set, section, key, value):
    """Unless the device augments them."""
    config = task_config()
    changed = getattr(config, section).model_copy(update={key: value})
    with pytest.raises(ConfigError, match=rf"{section}.{key}.*set augment\.run_on=device"):
        loader_of(make_data_set(SIZES), config.model_copy(update={section: changed}))


def test_labels_come_from_the_indexes_in_order(make_data_set, videos):
    rows = [{"set": "painted", "class": sample % 2} for sample in range(13)]
    labeled = {
        sample: (videos[sample], dataclasses.replace(INFO, labels=labels))
        for sample, labels in enumerate(rows)
    }
    data_set = make_data_set([4, 1, 8], labeled)
    assert list(labels_of(data_set.url, data_set.manifest)) == rows


def test_shards_without_labels_are_told(make_data_set, videos):
    labels = VideoInfo(**{**dataclasses.asdict(INFO), "labels": {"set": "painted"}})
    data_set = make_data_set([2, 2], {0: (videos[0], labels)})
    with pytest.raises(ShardError, match=r"no labels.*shard-000001.*0 of 2.*labeled source"):
        labels_of(data_set.url, data_set.manifest)


@pytest.mark.parametrize(
    ("indices", "targets"),
    [
        ([3, 2], np.zeros(2, np.int64)),
        ([2, 2], np.zeros(2, np.int64)),
        ([-1, 2], np.zeros(2, np.int64)),
        ([2, 3], np.zeros(3, np.int64)),
        ([2, 3], np.zeros((2, 1), np.int64)),
        ([2, 3], np.zeros(2, np.float32)),
        ([2, 3], np.zeros((2, 1), np.float64)),
    ],
)
def test_a_selection_that_could_mix_up_targets_is_refused(indices, targets):
    with pytest.raises(ValueError, match=r"indices|targets"):
        Selection(np.array(indices, np.int64), targets)


def test_an_empty_selection_is_refused(make_data_set):
    none = np.array([], dtype=np.int64)
    data_set = make_data_set(SIZES)
    with pytest.raises(ConfigError, match="0 to train on"):
        ClipLoader(task_config(), data_set.url, data_set.manifest, world(), Selection(none, none))
