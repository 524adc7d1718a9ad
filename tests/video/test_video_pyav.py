"""Decoding: exactly the frames requested, whatever the codec, the key frames and the time stamps.

Each frame of the videos has its number painted in, so a wrong frame names itself.
"""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import make_video, paint_frame, read_frame_number
from hypothesis import example, given, settings
from hypothesis import strategies as st

from svfap_dist.errors import DecodeError
from svfap_dist.video import pyav
from svfap_dist.video.frames import Frames, RgbFrames, WrongSizeError, YuvFrames
from svfap_dist.video.info import TooShortError, VideoInfo


def encode(
    num_frames=100,
    *,
    codec="libx264",
    container="mp4",
    size=(64, 48),
    fps=Fraction(25),
    options=None,
    pix_fmt="yuv420p",
    time_base=None,
    pts=None,
    first=0,
) -> bytes:
    """Numbered frames with any options of the encoder; pts in units of time_base."""
    noise = np.random.default_rng(0).integers(0, 16, (size[1], size[0], 3))
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = time_base or 1 / fps
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(paint_frame(number, size, noise), format="rgb24")
            frame.pts = first + (number if pts is None else pts[number])
            frame.time_base = stream.codec_context.time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return buffer.getvalue()


def info_of(num_frames=100, fps=25.0, size=(64, 48), constant=True) -> VideoInfo:
    return VideoInfo(num_frames, fps, *size, codec="any", constant_frame_rate=constant)


def decode(video: bytes, start: int, num_frames: int, stride: int, info: VideoInfo) -> Frames:
    numbers = range(start, start + num_frames * stride, stride)
    return pyav.decode(video, info, numbers)


def pixels(frames: Frames) -> np.ndarray:
    """RGB, or luma, which is as good as grey: [F, H, W, 3 or 1]."""
    return frames.pixels if isinstance(frames, RgbFrames) else frames.y[..., None]


def numbers(frames: Frames) -> list[int]:
    return [read_frame_number(frame) for frame in pixels(frames)]


X264 = {"preset": "veryfast", "threads": "1"}
VIDEOS = {
    "h264": lambda: encode(options={**X264, "g": "12", "bf": "0"}),
    "h264-b-frames": lambda: encode(options={**X264, "g": "15", "bf": "3", "b-pyramid": "normal"}),
    "h264-open-gop": lambda: encode(
        options={**X264, "bf": "3", "x264-params": "open-gop=1:keyint=10:min-keyint=10"}
    ),
    "h264-one-gop": lambda: encode(options={**X264, "g": "250", "bf": "2"}),
    "h264-intra": lambda: encode(options={**X264, "g": "1"}),
    "h264-late-start": lambda: encode(options={**X264, "g": "12", "bf": "2"}, first=37),
    "h264-matroska": lambda: encode(container="matroska", options={**X264, "g": "12", "bf": "2"}),
    "h264-flv-late": lambda: encode(container="flv", options={**X264, "g": "12"}, first=11),
    "h264-mpegts": lambda: encode(container="mpegts", options={**X264, "g": "12", "bf": "2"}),
    "h264-avi": lambda: encode(container="avi", options={**X264, "g": "12", "bf": "0"}),
    "h264-avi-b-frames": lambda: encode(container="avi", options={**X264, "g": "12", "bf": "2"}),
    "mpeg4-avi": lambda: encode(codec="mpeg4", container="avi", options={"g": "12", "q:v": "3"}),
    "hevc": lambda: encode(
        codec="libx265", options={"preset": "ultrafast", "x265-params": "keyint=14:log-level=none"}
    ),
    "vp9-webm": lambda: make_video(None, 100, codec="libvpx-vp9", container="webm", gop=12),
    "mjpeg-mov": lambda: make_video(None, 100, codec="mjpeg", container="mov"),
}


@pytest.fixture(scope="module", params=list(VIDEOS))
def video(request) -> bytes:
    codec = {"hevc": "libx265", "vp9-webm": "libvpx-vp9"}.get(request.param)
    if codec and codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    return VIDEOS[request.param]()


@pytest.mark.parametrize("stride", [1, 4])
def test_every_start_gives_exactly_the_frames_asked_for(video, stride):
    span = 5 * stride + 1
    for start in [*range(0, 30), 50, 63, 100 - span]:
        frames = decode(video, start, 6, stride, info_of())
        assert numbers(frames) == list(range(start, start + span, stride))


def test_a_seek_changes_no_pixel(video):
    whole = decode(video, 0, 100, 1, info_of())
    for start in (13, 40, 77):
        part, rows = decode(video, start, 5, 4, info_of()), slice(start, start + 17, 4)
        for name in ("pixels",) if isinstance(whole, RgbFrames) else ("y", "u", "v"):
            assert (getattr(part, name) == getattr(whole, name)[rows]).all()


@pytest.mark.parametrize("fps", [Fraction(30_000, 1001), Fraction(24_000, 1001), Fraction(60)])
@pytest.mark.parametrize("container", ["mp4", "matroska"])  # exact, and rounded to milliseconds
def test_other_constant_rates(fps, container):
    video = encode(fps=fps, container=container, options={**X264, "g": "12", "bf": "2"})
    for start in range(0, 85, 7):
        frames = decode(video, start, 4, 5, info_of(fps=float(fps)))
        assert numbers(frames) == list(range(start, start + 16, 5))


GAPS = st.lists(st.integers(1, 5), min_size=60, max_size=60)
# Frame 3 comes at 14; frame 5 of an even rate would at 5 * 165 / 59 = 13.983.
JUST_LATE = [5, 5, 4, *[3] * 39, *[2] * 17, 1]


@given(GAPS, st.integers(0, 40), st.integers(0, 30), st.sampled_from([{"bf": "0"}, {"bf": "2"}]))
@example(JUST_LATE, 5, 0, {"bf": "0"})
@settings(max_examples=12)
def test_variable_rate_gives_the_frame_on_the_screen(gaps, start, first, options):
    pts = np.concatenate([[0], np.cumsum(gaps)[:-1]])  # in hundredths of a second
    video = encode(
        60,
        pts=pts.tolist(),
        first=first,
        time_base=Fraction(1, 100),
        container="matroska",
        options={**X264, "g": "10", **options},
    )
    fps = 59 / (float(pts[-1]) / 100)
    frames = decode(video, start, 5, 4, info_of(60, fps, constant=False))
    # In exact numbers, so that a frame that comes just at a moment counts, and one that comes a
    # 59th of a hundredth later does not.
    moments = [Fraction((start + 4 * k) * int(pts[-1]), 59) for k in range(5)]
    expected = [sum(time <= moment for time in pts.tolist()) - 1 for moment in moments]
    assert numbers(frames) == expected


def test_the_last_frame_of_a_variable_rate_can_be_had():
    pts = [0, 1, 2, 3, 10, 11, 12, 30]
    video = make_video(None, 8, fps=25, pts=pts, gop=3)
    frames = decode(video, 7, 1, 1, info_of(8, 7 / (30 / 25), constant=False))
    assert numbers(frames) == [7]


@pytest.mark.parametrize("size", [(65, 49), (63, 50), (66, 47)])
def test_odd_sizes(size):
    video = encode(20, size=size, pix_fmt="yuv444p", options=X264)
    frames = decode(video, 3, 4, 2, info_of(20, size=size))
    assert pixels(frames).shape == (4, size[1], size[0], 3)
    assert numbers(frames) == [3, 5, 7, 9]


@pytest.mark.parametrize("size", [(64, 48), (65, 49)])
def test_planes_are_those_of_the_decoder(size):
    video = make_video(None, 30, size=size, codec="libvpx-vp9", container="webm")
    frames = decode(video, 5, 6, 2, info_of(30, size=size))
    assert isinstance(frames, YuvFrames)
    with av.open(io.BytesIO(video)) as container:
        expected = list(container.decode(video=0))[5:17:2]
    for k, frame in enumerate(expected):
        raw = av.CodecContext.create("rawvideo", "w")
        raw.width, raw.height, raw.pix_fmt, raw.time_base = *size, "yuv420p", Fraction(1, 25)
        planes = b"".join(bytes(packet) for packet in [*raw.encode(frame), *raw.encode()])
        assert b"".join(plane[k].tobytes() for plane in (frames.y, frames.u, frames.v)) == planes


def test_colors_that_planes_cannot_say_are_those_of_pyav():
    video = encode(20, pix_fmt="yuv444p", options=X264)
    with av.open(io.BytesIO(video)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    frames = decode(video, 5, 6, 2, info_of(20))
    assert isinstance(frames, RgbFrames)
    assert (frames.pixels == np.stack(expected[5:17:2])).all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ("bt601", False)),
        ({"colorspace": "bt709", "color_range": "tv"}, ("bt709", False)),
        ({"colorspace": "smpte170m", "color_range": "pc"}, ("bt601", True)),
        ({"colorspace": "bt2020nc"}, None),
    ],
)
def test_matrix_and_range_are_those_of_the_stream(flags, expected):
    frames = decode(encode(4, options={**X264, **flags}), 0, 2, 1, info_of(4))
    if expected is None:
        assert isinstance(frames, RgbFrames)
    else:
        assert isinstance(frames, YuvFrames)
        assert frames.colors == expected


def count_decoded(monkeypatch) -> list[int]:
    """Counts frames that leave the decoder, by watching the generator that decode reads from."""
    seen: list[int] = []
    original = pyav._timed

    def counting(*arguments):
        for time, duration, frame in original(*arguments):
            seen.append(int(time * frame.time_base * 25))
            yield time, duration, frame

    monkeypatch.setattr(pyav, "_timed", counting)
    return seen


def test_no_more_is_decoded_than_from_key_frame_to_last_wanted(monkeypatch):
    seen = count_decoded(monkeypatch)
    decode(encode(options={**X264, "g": "10", "bf": "2", "sc_threshold": "0"}), 47, 3, 4, info_of())
    assert seen == list(range(40, 56))


def test_too_short():
    video = make_video(None, 30)
    with pytest.raises(TooShortError) as caught:
        decode(video, 20, 6, 2, info_of(40))
    assert "1.160 s" in caught.value.found  # the 30th frame


def test_another_size_than_stated():
    with pytest.raises(WrongSizeError, match="64x48 for 66x48"):
        decode(make_video(None, 30), 0, 2, 1, info_of(30, size=(66, 48)))


@pytest.mark.parametrize("content", [b"", b"no video at all" * 50])
def test_what_is_no_video(content):
    with pytest.raises(DecodeError):
        decode(content, 0, 2, 1, info_of())


def test_a_video_cut_short_gives_its_whole_frames_or_an_error():
    whole = make_video(None, 60, container="mkv")
    half = whole[: len(whole) // 2]
    assert numbers(decode(half, 0, 4, 4, info_of(60))) == [0, 4, 8, 12]
    with pytest.raises(DecodeError):
        decode(half, 30, 6, 5, info_of(60))


def test_sound_alone_is_an_error():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as output:
        stream = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        output.mux(stream.encode(sound))
        output.mux(stream.encode())
    with pytest.raises(DecodeError, match="No video stream"):
        decode(buffer.getvalue(), 0, 2, 1, info_of())
