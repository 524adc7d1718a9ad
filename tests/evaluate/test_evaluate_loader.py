"""Multi-clip testing: the windows and squares of VideoMAE, none made twice, shares that add up."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from labelled import INFO, selection_of, target_of, task_config
from loaders import NO_VIDEO, SIZES, world
from numbered_shards import FRAMES, sample_and_frame

from svfap_dist.config import FinetuneConfig
from svfap_dist.data.clips import plan_multi_clip
from svfap_dist.evaluate import loader
from svfap_dist.video.views import Crop

TESTED = list(range(0, 51, 5))  # 11 samples


def config_of(segments: int, crops: int, micro_batch_size: int = 8, **data):
    config = task_config(**data)
    return config.model_copy(
        update={
            "finetune": FinetuneConfig(test_segments=segments, test_crops=crops),
            "train": config.train.model_copy(update={"micro_batch_size": micro_batch_size}),
        }
    )


def batches_of(data_set, config, rank=0, size=1) -> list:
    place, selection = world(rank, size), selection_of(TESTED)
    return list(loader.test_batches(config, data_set.url, data_set.manifest, place, selection))


def clips_of(batches) -> list[tuple]:
    """(row, key, target, frames painted into the clip, share) of each clip, in order."""
    return [
        (
            batch.rows[owner],
            batch.keys[owner],
            int(batch.targets[owner]),
            tuple(sample_and_frame(frame.numpy()) for frame in clip),
            share,
        )
        for batch in batches
        for clip, owner, share in zip(
            batch.frames, batch.owners.tolist(), batch.shares.tolist(), strict=True
        )
    ]


def expected_clips(rows, starts: list[int], share: float) -> list[tuple]:
    return [
        (
            row,
            f"clip-{TESTED[row]:03d}",
            target_of(TESTED[row]),
            tuple((TESTED[row], start + 2 * k) for k in range(4)),
            share,
        )
        for row in rows
        for start in starts
    ]


@pytest.mark.parametrize("size", [1, 2])
def test_windows_are_laid_evenly_and_equal_squares_made_once(make_data_set, size):
    """Frames are square, so both crops of a window are one."""
    data_set = make_data_set(SIZES)
    for rank in range(size):
        batches = batches_of(data_set, config_of(3, 2, micro_batch_size=12), rank, size)
        assert [len(batch.rows) for batch in batches[:-1]] == [2] * (len(batches) - 1)
        room = FRAMES - 7
        expected = expected_clips(range(rank, 11, size), [0, room // 2, room], 1 / 3)
        found = clips_of(batches)
        assert [clip[:4] for clip in found] == [clip[:4] for clip in expected]
        assert [clip[4] for clip in found] == pytest.approx([clip[4] for clip in expected])


def test_one_segment_is_the_middle_and_short_videos_are_one_window(make_data_set, videos):
    short = {10: (videos[10], dataclasses.replace(INFO, num_frames=4))}
    data_set = make_data_set(SIZES, short)
    found = clips_of(batches_of(data_set, config_of(1, 1, micro_batch_size=1)))
    middle = (FRAMES - 7) // 2
    of_short = (2, "clip-010", target_of(10), tuple((10, f) for f in (0, 2, 3, 3)), 1.0)
    expected = expected_clips(range(11), [middle], 1.0)
    expected[2] = of_short
    assert found == expected
    of_two = [clip for clip in clips_of(batches_of(data_set, config_of(2, 2))) if clip[0] == 2]
    assert of_two == [of_short]


def test_bad_samples_are_left_out_and_listed(make_data_set):
    data_set = make_data_set(SIZES, dict.fromkeys([0, 5, 20], NO_VIDEO))
    batches = batches_of(data_set, config_of(2, 1, micro_batch_size=4))
    assert [bad.index for batch in batches for bad in batch.bad] == [0, 5, 20]
    assert [batch.rows for batch in batches[:3]] == [[], [2, 3], [5]]
    rows = [row for row in range(11) if row not in (0, 1, 4)]
    assert clips_of(batches) == expected_clips(rows, [0, FRAMES - 7], 0.5)
    assert batches[0].frames.shape == (0, 4, 32, 32, 3)
    assert batches[0].scores(torch.zeros(0, 7)).shape == (0, 7)


def test_scores_are_means_over_all_clips_as_if_each_were_made():
    """Three windows, of which two are one clip, times two squares; and a sample of one clip."""
    shares = torch.tensor([2 / 6, 2 / 6, 1 / 6, 1 / 6, 1.0])
    owners, none = torch.tensor([0, 0, 0, 0, 1]), torch.zeros(0)
    batch = loader.TestBatch(none, owners, shares, [4, 5], ["a", "b"], none, [])
    of_clips = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    each = of_clips[[0, 0, 1, 1, 2, 3]].mean(dim=0)
    torch.testing.assert_close(batch.scores(of_clips), torch.stack([each, of_clips[4]]))


@pytest.mark.parametrize(
    ("height", "width", "crops", "expected"),
    [
        (160, 160, 2, {Crop(0, 0, 160, 160): 2}),
        (160, 200, 2, {Crop(0, 0, 160, 160): 1, Crop(0, 40, 160, 160): 1}),
        (201, 160, 3, {Crop(top, 0, 160, 160): 1 for top in (0, 20, 41)}),
        (160, 161, 3, {Crop(0, 0, 160, 160): 2, Crop(0, 1, 160, 160): 1}),
        (100, 160, 1, {Crop(0, 30, 100, 100): 1}),
    ],
)
def test_squares_lie_evenly_along_the_longer_side(height, width, crops, expected):
    info = dataclasses.replace(INFO, height=height, width=width)
    assert plan_multi_clip(info, config_of(2, crops))[1] == expected


def test_squares_lie_in_the_region():
    info = dataclasses.replace(INFO, height=224, width=300)
    starts, crops = plan_multi_clip(info, config_of(4, 2, region="center"))
    assert crops == {Crop(0, 38, 224, 224): 2}
    assert starts == {0: 1, 7: 1, 15: 1, 23: 1}  # of the 23 that there is room for
