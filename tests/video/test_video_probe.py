"""What the probe says of whole and of broken videos, and how it counts frames and rates."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import make_video, read_frame_number
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Limits, Rejected, probe
from svfap_dist.video.structure import missing_bytes
from svfap_dist.video.timeline import frame_rate

CONTAINERS = [
    ("libx264", "mp4"),
    ("libx264", "mkv"),
    ("libx264", "mov"),
    ("libx264", "avi"),
    ("libx264", "flv"),
    ("mjpeg", "mp4"),
    ("mpeg4", "avi"),
    ("libvpx-vp9", "webm"),
    ("libvpx", "webm"),
]


def decoded_numbers(data: bytes) -> list[int]:
    """The slow way to know a video: decode all of it."""
    with av.open(io.BytesIO(data), "r") as container:
        frames = container.decode(video=0)
        return [read_frame_number(frame.to_ndarray(format="rgb24")) for frame in frames]


def reason(data: bytes, min_frames: int = 61) -> str:
    result = probe(data, min_frames)
    return result.reason if isinstance(result, Rejected) else "good"


@pytest.mark.parametrize(("codec", "container"), CONTAINERS)
def test_a_good_video_is_what_a_full_decode_says(codec: str, container: str) -> None:
    data = make_video(None, 70, codec=codec, container=container)
    assert decoded_numbers(data) == list(range(70))
    info = probe(data)
    assert isinstance(info, VideoInfo)
    assert (info.num_frames, info.width, info.height) == (70, 64, 48)
    assert (info.fps, info.constant_frame_rate, info.labels) == (25.0, True, {})


def test_b_frames_and_open_ends_do_not_change_the_count() -> None:
    options = {"bf": "3", "preset": "fast"}
    assert probe(make_video(None, 70, encoder_options=options)) == probe(make_video(None, 70))


def test_equal_calls_give_equal_videos() -> None:
    for codec, container in CONTAINERS:
        clips = [make_video(None, 5, codec=codec, container=container) for _ in range(2)]
        assert clips[0] == clips[1]


@pytest.mark.parametrize(("codec", "container"), CONTAINERS)
def test_of_a_cut_file_no_frame_is_counted_that_is_not_there(codec: str, container: str) -> None:
    data = make_video(None, 70, codec=codec, container=container)
    for length in range(1, len(data), len(data) // 25):
        info = probe(data[:length], 1)
        if isinstance(info, VideoInfo):
            # These two say nothing of their size, and may lose up to half a second unnoticed.
            assert container in ("avi", "flv")
            assert info.num_frames >= 70 - 13
            assert decoded_numbers(data[:length]) == list(range(info.num_frames))


@pytest.mark.parametrize("container", ["mp4", "mov", "mkv", "webm", "flv"])
def test_a_cut_file_is_called_truncated(container: str) -> None:
    codec = "libvpx-vp9" if container == "webm" else "libx264"
    data = make_video(None, 70, codec=codec, container=container)
    assert {reason(data[: len(data) * tenth // 10]) for tenth in range(1, 10)} == {"truncated"}


def test_a_cut_mp4_with_its_index_in_front_is_truncated() -> None:
    data = make_video(None, 70, container_options={"movflags": "faststart"})
    assert data.index(b"moov") < data.index(b"mdat")
    assert reason(data) == "good"
    assert reason(data[:-1]) == "truncated"


def test_min_frames_is_the_first_length_that_is_good() -> None:
    data = make_video(None, 10)
    assert reason(data, 10) == "good"
    assert probe(data, 11) == Rejected("too_short", "10 frames, fewer than 11")


def test_what_is_no_video_is_told_apart() -> None:
    playlist = (
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    )
    assert reason(b"") == "empty"
    assert reason(b"this is no video" * 100) == "unreadable"
    assert reason(playlist) == "unreadable"
    assert reason(_sound_only()) == "no_video_stream"


def test_a_video_that_no_decoder_takes_is_undecodable() -> None:
    data = bytearray(make_video(None, 70))
    start = data.index(b"mdat") + 4
    size = int.from_bytes(data[start - 8 : start - 4], "big") - 8
    data[start : start + size] = b"\x00" * size
    assert reason(bytes(data)) == "undecodable"


def test_frames_of_too_many_pixels_are_refused() -> None:
    data = make_video(None, 70, size=(64, 48))
    assert probe(data, 61, Limits(pixels=64 * 48)) == probe(data)
    assert reason(data) == "good"
    refused = Rejected("too_large", "64x48 pixels")
    assert probe(data, 61, Limits(pixels=64 * 48 - 1)) == refused


def _sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as output:
        stream = output.add_stream("aac", rate=16000)
        silence = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return buffer.getvalue()


def test_variable_frame_rate_is_seen() -> None:
    info = probe(make_video(None, 70, pts=[i + (i > 30) for i in range(70)]))
    assert isinstance(info, VideoInfo)
    assert not info.constant_frame_rate
    assert info.fps == pytest.approx(25 * 69 / 70)


def test_a_broadcast_rate_survives_a_container_that_counts_milliseconds() -> None:
    info = probe(make_video(None, 70, fps=Fraction(30000, 1001), container="mkv"))
    assert isinstance(info, VideoInfo)
    assert (info.fps, info.constant_frame_rate) == (30000 / 1001, True)


@given(
    st.sampled_from([Fraction(25), Fraction(30000, 1001), Fraction(24000, 1001), Fraction(60)]),
    st.sampled_from([Fraction(1, 1000), Fraction(1, 12800), Fraction(1, 90000)]),
    st.integers(2, 400),
    st.integers(0, 5000),
)
def test_rounded_times_of_a_constant_rate_are_constant(
    rate: Fraction, time_base: Fraction, length: int, start: int
) -> None:
    times = [start + round(i / rate / time_base) for i in range(length)]
    assert frame_rate(times, time_base, [rate]) == (float(rate), True)
    measured, constant = frame_rate(times, time_base, [None])
    assert constant
    # Rounding moves the first and the last time by up to half a tick each.
    assert measured == pytest.approx(float(rate), rel=float(rate * time_base) / (length - 1) * 1.1)
    if length > 8:  # one frame, held twice as long
        late = [t + (i > 4) * round(1 / rate / time_base) for i, t in enumerate(times)]
        assert not frame_rate(late, time_base, [rate])[1]


def test_without_times_the_declared_rate_is_taken() -> None:
    assert frame_rate([], Fraction(1, 1000), [None, Fraction(30)]) == (30.0, True)
    assert frame_rate([], Fraction(1, 1000), [None]) == (0.0, False)


@given(st.binary(max_size=200), st.sampled_from([b"\0\0\0\x18ftyp", b"\x1a\x45\xdf\xa3", b"RIFF"]))
def test_no_bytes_make_the_probe_fail(data: bytes, start: bytes) -> None:
    assert isinstance(probe(start + data), Rejected)


def test_structures_without_a_size_are_left_to_the_demuxer() -> None:
    whole_rest = (0).to_bytes(4, "big") + b"mdat" + b"x" * 50
    assert missing_bytes((16).to_bytes(4, "big") + b"ftypisom\0\0\0\0" + whole_rest) is None
    wide = (1).to_bytes(4, "big") + b"mdat" + (100).to_bytes(8, "big") + b"x" * 50
    cut = missing_bytes((16).to_bytes(4, "big") + b"ftypisom\0\0\0\0" + wide)
    assert cut == "box 'mdat' ends at byte 116 of 82"
    live = bytes.fromhex("1a45dfa380" + "18538067" + "01ffffffffffffff") + b"x" * 10
    assert missing_bytes(live) is None


def test_a_codec_that_this_ffmpeg_lacks_is_a_reason() -> None:
    video = make_video(None, 70, codec="libvpx-vp9", container="webm").replace(b"V_VP9", b"V_VPX")
    assert probe(video) == Rejected("no_video_stream", "streams: video")
