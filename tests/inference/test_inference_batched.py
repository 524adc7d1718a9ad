"""Many videos at once: the clips of each are the frames they should be, whatever else is there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from clips import make_video, read_frame_number

from svfap_dist.errors import DecodeError
from svfap_dist.inference import batched
from svfap_dist.inference.batched import Seen, look, look_at_all
from svfap_dist.inference.model_info import Card
from svfap_dist.inference.videos import BadVideo, Video, read
from svfap_dist.video import views as windows
from svfap_dist.video.views import Crop, Views

CARD = Card({"size": "nano"}, num_frames=4, frame_size=64, sampling_rate=2)


def numbers_of(clips: torch.Tensor) -> torch.Tensor:
    """In a network's place: the numbers painted into the frames, [B, F]."""
    return torch.tensor([[read_frame_number(f) for f in clip.numpy()] for clip in clips])


def every_five(info) -> Views:
    whole = Crop(0, 0, info.height, info.width)
    return Views.of(windows.covering(info.num_frames, 7, 5), [whole])


def videos_of(contents: dict[str, bytes]) -> list[Video]:
    return [Video(key, lambda data=data: read(data)) for key, data in contents.items()]


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


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("part_bytes", [1, 64 << 20])
def test_every_clip_of_every_video_and_reasons_for_the_others(
    contents, batch_size, part_bytes, monkeypatch
):
    monkeypatch.setattr(batched, "_PART_BYTES", part_bytes)
    found = list(
        look(videos_of(contents), CARD, every_five, numbers_of, batch_size=batch_size, threads=2)
    )
    assert [type(video) for video in found] == [BadVideo, Seen, Seen, BadVideo, Seen, BadVideo]
    assert [video.reason for video in found if isinstance(video, BadVideo)] == [
        "unreadable",
        "truncated",
        "empty",
    ]
    short, long, fits = (video for video in found if isinstance(video, Seen))
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
    (seen,) = look(
        videos_of({"a": video}),
        CARD,
        halves,
        lambda clips: clips[:, 0].float().mean(dim=(1, 2, 3)),
        batch_size=4,
        threads=1,
    )
    assert isinstance(seen, Seen)
    first, second = seen.outputs.reshape(2, 2)
    # Frame 0 is all black; bits 1 and 3 are set in frame 10, one of each half.
    assert abs(first[0] - first[1]) < 5
    assert min(second) > first.max() + 10


def test_a_video_that_breaks_in_its_later_part_costs_only_itself(monkeypatch):
    monkeypatch.setattr(batched, "_PART_BYTES", 1)
    good = make_video(None, 33, size=(64, 64))
    calls = []
    decode = batched.backends.decode

    def breaks(video, info, numbers):
        if video is videos["b"] and min(numbers) >= 20:
            raise DecodeError("Frame is damaged", where="20")
        calls.append(len(numbers))
        return decode(video, info, numbers)

    videos = {"a": good, "b": bytes(bytearray(good)), "c": make_video(None, 8, size=(64, 64))}
    monkeypatch.setattr(batched.backends, "decode", breaks)
    looked = look_at_all(
        videos_of(videos),
        CARD,
        every_five,
        numbers_of,
        batch_size=2,
        threads=2,
        progress=lambda done: None,
    )
    assert [video.key for video in looked.seen] == ["a", "c"]
    assert np.concatenate([video.outputs for video in looked.seen])[:, 0].tolist() == [
        *(0, 5, 10, 15, 20, 25, 26),
        *(0, 1),
    ]
    assert [(video.key, video.reason) for video in looked.bad] == [("b", "undecodable")]


def test_no_usable_video_is_an_error_that_names_them():
    with pytest.raises(DecodeError, match=r"2 videos.*a: empty.*b: unreadable"):
        look_at_all(
            videos_of({"a": b"", "b": b"junk"}),
            CARD,
            every_five,
            numbers_of,
            batch_size=1,
            threads=1,
            progress=lambda done: None,
        )
