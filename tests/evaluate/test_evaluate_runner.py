"""The views of each video are the frames they should be, whatever else is there; and means."""

from __future__ import annotations

import dataclasses
import functools
import sys

import numpy as np
import pytest
import torch
from clips import make_video, read_frame_number
from labeled import INFO, task_config
from loaders import NO_VIDEO, SIZES
from numbered_shards import FRAMES, sample_and_frame

from svfap_dist.config import FinetuneConfig
from svfap_dist.errors import DecodeError
from svfap_dist.evaluate import runner
from svfap_dist.evaluate.runner import Decoding, Source, ViewedVideo, to_scores, view_videos
from svfap_dist.inference.videos import fetch_video, view_all
from svfap_dist.model.weights import ModelInfo
from svfap_dist.shards.reader import BadSample, SampleReader
from svfap_dist.video import backends
from svfap_dist.video import info as windows
from svfap_dist.video.info import Crop, Views, segment_views

SHAPE = ModelInfo({"size": "nano"}, num_frames=4, frame_size=64, sampling_rate=2)


def numbers_of(clips: torch.Tensor) -> torch.Tensor:
    """In a network's place: the numbers painted into the frames, [B, F]."""
    return torch.tensor([[read_frame_number(f) for f in clip.numpy()] for clip in clips])


def every_five(info) -> Views:
    whole = Crop(0, 0, info.height, info.width)
    return Views.of(windows.covering_starts(info.num_frames, 7, 5), [whole])


def sources_of(contents: dict[str, bytes]) -> list[Source]:
    def source(key: str, data: bytes) -> Source:
        return lambda: dataclasses.replace(fetch_video(data), key=key)

    return [source(key, data) for key, data in contents.items()]


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    whole = make_video(None, 40, size=(64, 64), gop=40, container="mkv")
    return {
        "junk": b"no video",
        "short": make_video(None, 5, size=(64, 64)),
        "long": make_video(None, 33, size=(80, 64)),
        "cut": whole[: len(whole) // 2],
        "fits": make_video(None, 7, size=(64, 64)),
        "empty": b"",
    }


@pytest.mark.parametrize(
    ("batch_size", "part_bytes", "workers"),
    [(1, 1, 0), (3, 1, 0), (3, 64 << 20, 0), (100, 1, 0), (0, 1, 0), (0, 64 << 20, 1)],
)
def test_every_clip_of_every_video_and_reasons_for_the_others(
    contents, batch_size, part_bytes, workers, monkeypatch
):
    monkeypatch.setattr(runner, "_PART_BYTES", part_bytes)
    found = list(
        view_videos(
            sources_of(contents),
            SHAPE,
            every_five,
            numbers_of,
            batch_size=batch_size,
            decoding=Decoding(2, workers),
        )
    )
    assert [type(video) for video in found] == [
        BadSample,
        ViewedVideo,
        ViewedVideo,
        BadSample,
        ViewedVideo,
        BadSample,
    ]
    assert [video.reason for video in found if isinstance(video, BadSample)] == [
        "unreadable",
        "truncated",
        "empty",
    ]
    short, long, fits = (video for video in found if isinstance(video, ViewedVideo))
    assert [video.key for video in (short, long, fits)] == ["short", "long", "fits"]
    assert short.outputs.tolist() == [[0, 2, 4, 4]]
    assert fits.outputs.tolist() == [[0, 2, 4, 6]]
    assert list(long.views.starts) == [0, 5, 10, 15, 20, 25, 26]
    assert long.outputs.tolist() == [[s, s + 2, s + 4, s + 6] for s in long.views.starts]


def test_crops_of_a_window_stand_side_by_side():
    """Two halves of frames whose number is painted in blocks: the left one has other pixels."""

    def halves(info) -> Views:
        return Views.of([0, 10], [Crop(0, 0, 64, 64), Crop(0, 64, 64, 64)])

    video = make_video(None, 20, size=(128, 64))
    (seen,) = view_videos(
        sources_of({"a": video}),
        SHAPE,
        halves,
        lambda clips: clips[:, 0].float().mean(dim=(1, 2, 3)),
        batch_size=4,
        decoding=Decoding(1),
    )
    assert isinstance(seen, ViewedVideo)
    first, second = seen.outputs.reshape(2, 2)
    # Frame 0 is all black; bits 1 and 3 are set in frame 10, one of each half.
    assert abs(first[0] - first[1]) < 5
    assert min(second) > first.max() + 10


def test_a_video_that_breaks_in_its_later_part_costs_only_itself(monkeypatch):
    monkeypatch.setattr(runner, "_PART_BYTES", 1)
    good = make_video(None, 33, size=(64, 64))
    calls = []
    decode = backends.open_decoder("pyav")

    def breaks(video, info, numbers):
        if video is videos["b"] and min(numbers) >= 20:
            raise DecodeError("Frame is damaged", where="20")
        calls.append(len(numbers))
        return decode(video, info, numbers)

    videos = {"a": good, "b": bytes(bytearray(good)), "c": make_video(None, 8, size=(64, 64))}
    monkeypatch.setattr(backends, "open_decoder", lambda name: breaks)
    viewed, bad = view_all(
        sources_of(videos),
        SHAPE,
        every_five,
        numbers_of,
        batch_size=2,
        decoding=Decoding(2),
    )
    assert [video.key for video in viewed] == ["a", "c"]
    assert np.concatenate([video.outputs for video in viewed])[:, 0].tolist() == [
        *(0, 5, 10, 15, 20, 25, 26),
        *(0, 1),
    ]
    assert [(video.key, video.reason) for video in bad] == [("b", "undecodable")]


def test_no_usable_video_is_an_error_that_names_them():
    with pytest.raises(DecodeError, match=r"2 videos.*a: empty.*b: unreadable"):
        view_all(
            sources_of({"a": b"", "b": b"junk"}),
            SHAPE,
            every_five,
            numbers_of,
            batch_size=1,
            decoding=Decoding(1),
        )


TESTED = list(range(0, 51, 5))  # 11 samples


def config_of(segments: int, crops: int, **data):
    finetune = FinetuneConfig(test_segments=segments, test_crops=crops)
    return task_config(**data).model_copy(update={"finetune": finetune})


def frames_shown(clips: torch.Tensor) -> torch.Tensor:
    """Return the sample and frame numbers painted into clips, [B, F, 2]."""
    return torch.tensor([[sample_and_frame(frame) for frame in clip] for clip in clips.numpy()])


def viewed_of(data_set, config) -> list[ViewedVideo | BadSample]:
    reader, test, data = SampleReader(data_set.url, data_set.manifest), config.finetune, config.data
    return list(
        view_videos(
            [functools.partial(reader.read, index) for index in TESTED],
            data,
            segment_views(data, data.region, test.test_segments, test.test_crops),
            frames_shown,
            batch_size=0,
            decoding=Decoding.of(data, config.decode.backend),
        )
    )


def expected_frames(sample: int, starts: list[int]) -> list:
    return [[[sample, start + 2 * k] for k in range(4)] for start in starts]


def test_windows_are_laid_evenly_and_equal_squares_made_once(make_data_set):
    """Frames are square, so both crops of a window are one."""
    viewed = viewed_of(make_data_set(SIZES), config_of(3, 2))
    room = FRAMES - 7
    assert [video.key for video in viewed] == [f"clip-{sample:03d}" for sample in TESTED]
    for sample, video in zip(TESTED, viewed, strict=True):
        assert video.outputs.tolist() == expected_frames(sample, [0, room // 2, room])
        assert video.views.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_one_segment_is_the_middle_and_short_videos_are_one_window(make_data_set, videos):
    short = {10: (videos[10], dataclasses.replace(INFO, num_frames=4))}
    data_set = make_data_set(SIZES, short)
    of_short = [[[10, frame] for frame in (0, 2, 3, 3)]]
    viewed = viewed_of(data_set, config_of(1, 1))
    assert viewed[0].outputs.tolist() == expected_frames(0, [(FRAMES - 7) // 2])
    assert viewed[2].outputs.tolist() == of_short
    assert viewed_of(data_set, config_of(2, 2))[2].outputs.tolist() == of_short


def test_bad_samples_are_left_out_and_listed(make_data_set):
    data_set = make_data_set(SIZES, dict.fromkeys([0, 5, 20], NO_VIDEO))
    viewed = viewed_of(data_set, config_of(2, 1))
    assert [video.index for video in viewed if isinstance(video, BadSample)] == [0, 5, 20]
    assert isinstance(viewed[2], ViewedVideo)
    assert viewed[2].outputs.tolist() == expected_frames(10, [0, FRAMES - 7])


def test_a_video_that_hangs_its_decoder_costs_only_itself(make_data_set, monkeypatch):
    """A worker that cannot answer in time is killed, and the sample counts as hung."""
    monkeypatch.setattr(sys.modules[__name__], "TESTED", TESTED[:2])
    config = config_of(1, 1, decode_workers=1, decode_seconds=1e-6)
    viewed = viewed_of(make_data_set(SIZES), config)
    assert [video.reason for video in viewed if isinstance(video, BadSample)] == ["hung"] * 2


def test_a_file_that_hangs_its_probe_costs_only_itself(contents):
    """The deadline is proportional to the size, so the empty file has no time."""
    decoding = Decoding(2, 2, seconds=0, seconds_per_mib=1e6)
    sources = sources_of({key: contents[key] for key in ("short", "empty", "long")})
    viewed, bad = view_all(sources, SHAPE, every_five, numbers_of, batch_size=1, decoding=decoding)
    assert [(video.key, len(video.outputs)) for video in viewed] == [("short", 1), ("long", 7)]
    assert [(video.key, video.reason) for video in bad] == [("empty", "hung")]


def test_a_process_that_keeps_a_large_video_gives_the_same_clips(contents, monkeypatch):
    """One process has kept another video, or none, when a part arrives without its video."""
    monkeypatch.setattr(runner, "_PART_BYTES", 1)
    # Bytes after the last box of an mp4 are no frames.
    large = {key: contents[key] + bytes(1 << 20) for key in ("long", "fits")}
    seen = []
    for decoding in (Decoding(2, 2), Decoding(1)):
        sources = sources_of({**large, "short": contents["short"]})
        videos, _ = view_all(
            sources, SHAPE, every_five, numbers_of, batch_size=3, decoding=decoding
        )
        seen.append([(video.key, video.outputs.tolist()) for video in videos])
    assert [key for key, _ in seen[0]] == ["long", "fits", "short"]
    assert seen[0] == seen[1]


def test_scores_are_means_over_all_clips_as_if_each_were_made():
    """Three windows, of which two are one clip, times two squares."""
    views = Views.of([0, 0, 7], [Crop(0, 0, 8, 8), Crop(0, 4, 8, 8)])
    outputs = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    mean = ViewedVideo("a", INFO, views, outputs).mean
    np.testing.assert_allclose(mean, outputs[[0, 0, 1, 1, 2, 3]].mean(axis=0), rtol=1e-6)


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
    assert segment_views(SHAPE, "full", 2, crops)(info).crops == expected


def test_squares_lie_in_the_region():
    info = dataclasses.replace(INFO, height=224, width=300)
    views = segment_views(SHAPE, "center", 4, 2)(info)
    assert views.crops == {Crop(0, 38, 224, 224): 2}
    assert views.starts == {0: 1, 7: 1, 15: 1, 23: 1}  # of the 23 that there is room for


@pytest.mark.parametrize("activation", ["none", "sigmoid", "tanh"])
def test_scores_are_probabilities_or_activated_values(activation):
    outputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    probabilities = outputs.exp() / outputs.exp().sum(1, keepdim=True)
    torch.testing.assert_close(to_scores(outputs, "classification", activation), probabilities)
    squash = {"none": lambda x: x, "sigmoid": torch.sigmoid, "tanh": torch.tanh}[activation]
    torch.testing.assert_close(to_scores(outputs, "regression", activation), squash(outputs))
