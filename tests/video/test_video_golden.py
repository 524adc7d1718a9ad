"""Every backend gives exactly the frames requested, of every kind of video that it decodes.

Each frame has its number painted in, so a wrong one names itself. The lists requested are a strided
window, one frame, a few in any order and with repeats, and all of them.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
from clips import read_frame_number
from golden import GOLDEN, Golden
from torch.cuda import get_device_capability

from svfap_dist.errors import DecodeError
from svfap_dist.video import backends
from svfap_dist.video.backends import BACKENDS, nvdec_decodes
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.frames import Decoder, Frames, RgbFrames
from svfap_dist.video.info import TooShortError
from svfap_dist.video.pyav import pixel_format_of

needs_dali = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")


@functools.cache
def made(name: str) -> Golden:
    return GOLDEN[name]()


@functools.cache
def dali(device: str) -> Decoder:
    return DaliDecoder(device)


def cases() -> list:
    rows = [pytest.param("pyav", name, id=f"pyav-{name}") for name in GOLDEN]
    for device, mark in (("cpu", needs_dali), ("cuda", pytest.mark.gpu)):
        rows += [
            pytest.param(device, name, id=f"dali-{device}-{name}", marks=mark)
            for name in GOLDEN
            if BACKENDS["dali"].decodes(name.split("-")[0], device)
        ]
    return rows


# What DALI gets wrong or fails on there: its backend leaves these to the CPU.
ON_HOST = {"cuda": {"h264-intra", "h264-edit-list", "vp9-edit-list"}, "cpu": set()}


def numbers_in(frames: Frames) -> list[int]:
    """Painted numbers: luma is as good as grey."""
    pixels = frames.pixels if isinstance(frames, RgbFrames) else frames.y[..., None]
    return [read_frame_number(frame) for frame in pixels]


@pytest.mark.parametrize(("backend", "name"), cases())
def test_exactly_the_requested_frames(backend, name, monkeypatch):
    if backend != "pyav" and name not in ON_HOST[backend]:
        monkeypatch.setattr("svfap_dist.video.dali.decode", None)  # no help by the CPU
    golden = made(name)
    decoder: Decoder = backends.decode if backend == "pyav" else dali(backend)
    if backend == "cuda":
        pixels, card = pixel_format_of(golden.video, golden.info), get_device_capability()
        if not nvdec_decodes(golden.info.codec, pixels, card):
            with pytest.raises(DecodeError, match="decoding units"):
                decoder(golden.video, golden.info, [0])
            return
    count = golden.info.num_frames
    shuffled = np.random.default_rng(0).integers(0, count, 9).tolist()
    lists = [
        range(count),
        range(min(3, count - 1), count, 4),
        [count - 1],
        [*shuffled, shuffled[0]],
    ]
    for numbers in lists:
        frames = decoder(golden.video, golden.info, numbers)
        assert numbers_in(frames) == [golden.painted[number] for number in numbers]
    with pytest.raises(TooShortError):
        decoder(golden.video, golden.info, [0, count + 5])


@pytest.mark.parametrize(
    "name", ["h264", "vp9-webm", "mjpeg-avi", "h264-phase-ordered", "h264-phase-files"]
)
@pytest.mark.parametrize("backend", ["pyav", pytest.param("cpu", marks=needs_dali)])
def test_what_is_cut_short_or_no_video_is_an_error(backend, name):
    golden = made(name)
    decoder: Decoder = backends.decode if backend == "pyav" else dali(backend)
    last = [golden.info.num_frames - 1]
    for video in (b"", b"no video" * 99, golden.video[: len(golden.video) // 3]):
        with pytest.raises(DecodeError):
            decoder(video, golden.info, last)


@pytest.mark.parametrize("backend", ["pyav", pytest.param("cpu", marks=needs_dali)])
def test_an_unknown_codec_is_an_error(backend):
    golden = made("vp9-webm")
    decoder: Decoder = backends.decode if backend == "pyav" else dali(backend)
    with pytest.raises(DecodeError, match="No video stream"):
        decoder(golden.video.replace(b"V_VP9", b"V_VPX"), golden.info, [0])


def test_planes_are_handed_over_where_the_video_is_8_bit_420():
    as_rgb = {"h264-10-bit", "h264-odd-size"}  # the latter is 4:4:4
    for name in ("h264", "hevc", "vp9-odd-size", "mjpeg-mov", "h264-phase-ordered", *as_rgb):
        golden = made(name)
        frames = backends.decode(golden.video, golden.info, [0, 3])
        assert isinstance(frames, RgbFrames) == (name in as_rgb)
