"""Broken and hostile videos, one maker per kind: small files that are junk, have wrong headers, or
need more time or memory than any machine has."""

from __future__ import annotations

import io
import os
import struct
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.audio.stream import AudioStream
from av.video.stream import VideoStream
from clips import make_video


def make_all(folder: Path) -> dict[str, str]:
    """Write one of each into `folder`; the reason for which each is to be left out, by name."""
    good = make_video(None, 70)
    files = {
        "junk.mp4": ("unreadable", np.random.default_rng(0).bytes(20_000)),
        "empty.mp4": ("empty", b""),
        "truncated.mp4": ("truncated", good[: len(good) // 2]),
        "audio.mp4": ("no_video_stream", audio_only()),
        "one_frame.mp4": ("too_short", make_video(None, 1)),
        "rate_huge.mp4": ("odd_rate", with_timescale(good, 12800 * 40_000)),
        "rate_near_zero.mp4": ("odd_rate", make_video(None, 70, fps=Fraction(1, 4))),
        "rate_lies.mp4": ("odd_rate", with_timescale(good, 12800 * 20)),
        "wide.mp4": ("too_large", many_frames((8192, 8192), 70, "libx264", encoded=1)),
        "wide_frames.avi": ("undecodable", wide_frames()),
        "slow.mp4": ("hung", many_frames((4096, 2160), 4000, "mpeg4")),
        "bomb.mp4": ("too_long", many_frames((3840, 2160), 3600 * 25 + 50, "libx264")),
    }
    folder.mkdir(parents=True)
    for name, (_, data) in files.items():
        (folder / name).write_bytes(data)
    with open(folder / "huge.mp4", "wb") as file:
        file.truncate(2 << 30)  # sparse: takes no room
    os.mkfifo(folder / "stuck.mp4")  # opening it blocks forever, as on a lost file server
    reasons = {name: reason for name, (reason, _) in files.items()}
    return {**reasons, "huge.mp4": "too_big", "stuck.mp4": "hung"}


def audio_only() -> bytes:
    """An mp4 with a second of sound and no picture."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = cast(AudioStream, output.add_stream("aac", rate=16000))
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()


def with_timescale(mp4: bytes, timescale: int) -> bytes:
    """An mp4 whose video track declares a wrong number of ticks per second: all times are wrong."""
    at = mp4.index(b"mdhd") + 4 + 12  # after version, flags, two dates
    return mp4[:at] + struct.pack(">I", timescale) + mp4[at + 4 :]


def wide_frames() -> bytes:
    """An AVI file that announces 64 x 48 pixels and whose frames say 16384 x 16384."""
    data = make_video(None, 70, codec="mjpeg", container="avi")
    ours, theirs = struct.pack(">HH", 48, 64), struct.pack(">HH", 16384, 16384)
    return data.replace(b"\xff\xc0\x00\x11\x08" + ours, b"\xff\xc0\x00\x11\x08" + theirs)


def many_frames(size: tuple[int, int], count: int, codec: str, encoded: int = 25) -> bytes:
    """A valid video of `count` black frames, of which the first are encoded, then repeated."""
    template, packets = _black_frames(size, codec, encoded)
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as output:
        stream = output.add_stream_from_template(template)
        for number in range(count):
            source = packets[number % len(packets)]
            packet = av.Packet(bytes(source))
            packet.stream, packet.time_base = stream, Fraction(1, 25)
            packet.pts = packet.dts = number
            packet.duration, packet.is_keyframe = 1, source.is_keyframe
            output.mux(packet)
    return file.getvalue()


def _black_frames(
    size: tuple[int, int], codec: str, count: int
) -> tuple[VideoStream, list[av.Packet]]:
    file = io.BytesIO()
    options = {"preset": "ultrafast", "threads": "1", "x264-params": "cabac=1:rc-lookahead=0"}
    options = options if codec == "libx264" else {}
    with av.open(file, "w", format="mp4") as output:
        stream = cast(VideoStream, output.add_stream(codec, rate=25, options=options))
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        stream.codec_context.gop_size, stream.codec_context.max_b_frames = 25, 0
        black = av.VideoFrame(*size, "yuv420p")
        for plane in black.planes:
            plane.update(bytes(plane.buffer_size))
        for number in range(count):
            black.pts, black.time_base = number, Fraction(1, 25)
            output.mux(stream.encode(black))
        output.mux(stream.encode())
    source = av.open(io.BytesIO(file.getvalue()))
    video = source.streams.video[0]
    return video, [packet for packet in source.demux(video) if packet.size]
