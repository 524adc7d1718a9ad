"""DALI's graph on the CPU: batches of unlike videos, crops, colors, and what a bad video costs."""

from __future__ import annotations

import dataclasses
import io

import av
import numpy as np
import pytest
import torch
from clips import make_video, read_frame_number
from golden import GOLDEN

from svfap_dist.video import backends, dali
from svfap_dist.video.backends import BACKENDS
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.frames import RgbFrames, VideoRequest, WrongSizeError
from svfap_dist.video.info import Crop, TooShortError, VideoInfo
from svfap_dist.video.pyav import locate_frames

pytestmark = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")

SIZE = 32
KINDS = (
    "vp9-webm",
    "mjpeg-avi",
    "vp9-odd-size",
    "vp9-variable-rate",
    "vp9-phase-ordered",
    "vp9-phase-files",
)


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    return DaliDecoder("cpu", pipelines=2)


def request(name: str, numbers, crops: int = 1, flip: bool = False) -> VideoRequest:
    golden = GOLDEN[name]()
    whole = Crop(0, 0, golden.info.height, golden.info.width)
    return VideoRequest(golden.video, golden.info, numbers, [whole] * crops, flip)


def painted(clip: torch.Tensor) -> list[int]:
    return [read_frame_number(frame.numpy()) for frame in clip]


def test_a_batch_of_unlike_videos(decoder):
    numbers = [[3 + k, 30 - k, 7] for k in range(len(KINDS))]
    requests = [request(*each) for each in zip(KINDS, numbers, strict=True)]
    batch = decoder.decode_batch(requests, SIZE)
    assert batch.bad == {}
    assert batch.clips.shape == (len(KINDS), 3, SIZE, SIZE, 3)
    assert batch.clips.dtype == torch.uint8
    for name, wanted, clip in zip(KINDS, numbers, batch.clips, strict=True):
        assert painted(clip) == [GOLDEN[name]().painted[number] for number in wanted]


def test_pipelines_and_company_change_no_bit(decoder):
    requests = [request(name, [5, 9], crops=2) for name in KINDS]
    whole = decoder.decode_batch(requests, SIZE).clips
    alone = DaliDecoder("cpu", pipelines=1, threads=2)
    assert torch.equal(alone.decode_batch(requests, SIZE).clips, whole)
    assert torch.equal(alone.decode_batch(requests[3:4], SIZE).clips, whole[6:8])


def test_batches_of_any_size_are_decoded_by_the_same_pipelines(monkeypatch):
    """Each build takes seconds on a GPU; the first batches are small ones that grow."""
    builds = []
    build = dali._Pipeline._build
    monkeypatch.setattr(dali._Pipeline, "_build", lambda self: builds.append(self) or build(self))
    decoder = DaliDecoder("cpu", pipelines=2)
    decoder.reserve(7)
    for count in (1, 3, 4, 7, 2):
        requests = [request("vp9-webm", [number, 9]) for number in range(count)]
        batch = decoder.decode_batch(requests, SIZE)
        assert [painted(clip)[0] for clip in batch.clips] == list(range(count))
    assert len(builds) == len(set(builds)) == 2


def test_a_result_outlives_the_next_batches(decoder):
    first = decoder.decode_batch([request("vp9-webm", [1, 2])], SIZE).clips
    kept = first.clone()
    for _ in range(3):
        decoder.decode_batch([request("mjpeg-avi", [40, 41])], SIZE)
    assert torch.equal(first, kept)


def test_crops_of_one_decoded_window(decoder):
    """Each crop is what cutting and resizing the whole frames gives, with torch's filter."""
    golden = GOLDEN["vp9-webm"]()
    crops = [Crop(10, 20, 100, 64), Crop(0, 0, 144, 160), Crop(50, 60, SIZE, SIZE)]
    batch = decoder.decode_batch([VideoRequest(golden.video, golden.info, [4, 9], crops)], SIZE)
    frames = torch.from_numpy(decoder(golden.video, golden.info, [4, 9]).pixels).permute(0, 3, 1, 2)
    for crop, clip in zip(crops, batch.clips, strict=True):
        cut = frames[:, :, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
        expected = torch.nn.functional.interpolate(
            cut.float(), size=(SIZE, SIZE), mode="bilinear", antialias=True
        )
        difference = (clip.permute(0, 3, 1, 2).float() - expected).abs()
        assert difference.max() <= 2
    assert torch.equal(batch.clips[2].permute(0, 3, 1, 2), cut)  # of the right size: not touched


def test_a_flipped_clip_is_the_mirror_image(decoder):
    plain_clip, flipped = (
        decoder.decode_batch([request("vp9-webm", [5], flip=flip)], SIZE).clips
        for flip in (False, True)
    )
    assert torch.equal(flipped, plain_clip.flip(3))


@pytest.mark.parametrize("matrix", ["bt601", "bt709"])
@pytest.mark.parametrize("range_", ["tv", "pc"])
def test_colors_are_those_of_the_cpus_path(decoder, matrix, range_):
    """Even areas, so that neither filters nor the finer points of chroma matter."""
    target, (y, u, v) = io.BytesIO(), (120, 90, 180)
    names = {"bt601": "smpte170m", "bt709": "bt709"}
    options = {"colorspace": names[matrix], "color_range": range_, "cpu-used": "8"}
    with av.open(target, "w", format="webm") as output:
        stream = output.add_stream("libvpx-vp9", rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        planes = np.repeat(np.array([y, u, v], np.uint8), [64 * 64, 32 * 32, 32 * 32])
        output.mux(stream.encode(av.VideoFrame.from_ndarray(planes.reshape(96, 64), "yuv420p")))
        output.mux(stream.encode())
    info = VideoInfo(1, 25.0, 64, 64, "vp9")
    with av.open(io.BytesIO(target.getvalue())) as container:
        (frame,) = container.decode(video=0)
        expected = frame.to_ndarray(format="rgb24").astype(int)
    got = decoder(target.getvalue(), info, [0]).pixels.astype(int)
    assert np.abs(got - expected).max() <= 2
    other = {"bt601": "bt709", "bt709": "bt601"}[matrix]
    assert (
        [located.matrix for located in locate_frames(target.getvalue(), info, [0])]
        == [matrix]
        != [other]
    )


def test_a_bad_video_costs_its_own_clips(decoder):
    """Junk, a cut file, a wrong size, a number too high: of each, what it is; and the others' clips
    are the same as without them. A codec that DALI lacks is decoded on the CPU."""
    good = [request(name, [2, 8], crops=2) for name in ("vp9-webm", "mjpeg-avi")]
    first = good[0]
    bad = [
        dataclasses.replace(first, video=b"junk" * 500),
        dataclasses.replace(first, video=first.video[:700]),
        request("h264", [2, 8], crops=2),
        dataclasses.replace(first, info=dataclasses.replace(first.info, width=99)),
        dataclasses.replace(first, numbers=[2, 99]),
    ]
    batch = decoder.decode_batch([bad[0], good[0], *bad[1:], good[1]], SIZE)
    kinds = [type(batch.bad[row]) for row in sorted(batch.bad)]
    assert sorted(batch.bad) == [0, 2, 4, 5]
    assert kinds[2:] == [WrongSizeError, TooShortError]
    alone = decoder.decode_batch(good, SIZE)
    assert alone.bad == {}
    assert torch.equal(batch.clips[[2, 3, 12, 13]], alone.clips)
    assert not batch.clips[[0, 1, 4, 5, *range(8, 12)]].any()
    for clip in batch.clips[[6, 7]]:
        assert painted(clip) == [2, 8]


def test_a_video_that_dali_fails_on_is_left_to_the_cpu(monkeypatch, caplog):
    """From the first failure on: each one ends a pipeline. A mirrored clip stays mirrored."""
    decoder = DaliDecoder("cpu")
    h264 = request("h264", [2, 8])
    plain = decoder.decode_batch([h264], SIZE)
    assert painted(plain.clips[0]) == [2, 8]
    assert "decode.backend=pyav" in caplog.text
    caplog.clear()
    monkeypatch.setattr(dali._Pipeline, "start", None)  # never called again
    mirrored = decoder.decode_batch([dataclasses.replace(h264, flip=True)], SIZE)
    assert torch.equal(mirrored.clips, plain.clips.flip(3))
    assert [read_frame_number(f) for f in decoder(h264.video, h264.info, [5]).pixels] == [5]
    assert caplog.messages == []


def test_on_a_gpu_the_cpu_decodes_what_an_edit_list_shortens(monkeypatch):
    """DALI's GPU decoder would show the frames that the list leaves out."""
    decoder = DaliDecoder("cpu")
    monkeypatch.setattr(decoder, "_gpu", (9, 0))
    monkeypatch.setattr(dali._Pipeline, "start", None)  # never called
    edited = request("vp9-edit-list", [0, 3])
    assert painted(decoder.decode_batch([edited], SIZE).clips[0]) == [5, 8]
    frames = decoder(edited.video, edited.info, [0, 3]).pixels
    assert [read_frame_number(frame) for frame in frames] == [5, 8]


def test_all_backends_show_the_same_picture(decoder):
    """Codecs are exact, so only the rounding of colors and the filter of chroma may differ."""
    golden = GOLDEN["vp9-webm"]()
    luma = backends.decode(golden.video, golden.info, [7, 8]).y.astype(float)
    rgb = decoder(golden.video, golden.info, [7, 8])
    assert isinstance(rgb, RgbFrames)
    grey = rgb.pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs((luma - 16) * 255 / 219 - grey).mean() < 1.0


def test_a_video_of_one_frame(decoder):
    video = make_video(None, 1, codec="libvpx-vp9", container="webm", painted=[77])
    info = VideoInfo(1, 25.0, 64, 48, "vp9")
    assert read_frame_number(decoder(video, info, [0]).pixels[0]) == 77
    with pytest.raises(TooShortError):
        decoder(video, info, [1])


def test_what_the_gpu_cannot_decode_is_refused_before_it_ends_a_batch(monkeypatch):
    """Decode on the CPU with a card's number: the good clip stays in its batch, not alone."""
    decoder = DaliDecoder("cpu")
    monkeypatch.setattr(decoder, "_gpu", (9, 0))
    monkeypatch.setattr(dali, "_one_by_one", None)
    batch = decoder.decode_batch([request("vp9-webm", [2]), request("h264-10-bit", [2])], SIZE)
    assert list(batch.bad) == [1]
    assert "h264 of yuv420p10le, and compute capability 9.0" in str(batch.bad[1])
    assert painted(batch.clips[0]) == [2]
