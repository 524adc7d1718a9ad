"""Whatever is done to the bytes of an mp4, the probe says what it is or why it cannot be used."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import struct
import zlib
from collections.abc import Callable, Iterator

import av
import numpy as np
import pytest
from av.logging import set_level
from clips import make_video
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_videos import with_matrix

from svfap_dist.errors import DecodeError
from svfap_dist.video import structure
from svfap_dist.video.frames import whole_frames
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.probe import Limits, Rejected, probe
from svfap_dist.video.pyav import decode, locate_frames

SIDE, FRAMES = 32, 6
LIMITS = Limits(pixels=1 << 20)
MEMORY = 512 << 20  # bytes that a file of a few KB may take
QUICK = settings(
    deadline=datetime.timedelta(minutes=2),  # of one example: this finds hangs
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
SIZES = [0, 1, 2, 7, 8, 9, 16, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]


@functools.cache
def bases() -> tuple[bytes, ...]:
    """Small videos of every structure that FFmpeg writes."""
    options = [{}, {"movflags": "faststart"}, {"movflags": "frag_keyframe"}]
    options += [{"movflags": "frag_every_frame+empty_moov+default_base_moof"}]
    size = (SIDE, SIDE)
    made = [make_video(None, FRAMES, size=size, container_options=each) for each in options]
    b_frames = {"preset": "fast", "bf": "2"}
    made.append(
        with_matrix(make_video(None, FRAMES, size=size, encoder_options=b_frames), 0, 1, -1, 0)
    )
    made.append(make_video(None, FRAMES, size=size, codec="mjpeg", container="mov"))
    return tuple(made)


def boxes(data: bytes) -> list[structure._Box]:
    return list(structure._walk(data))


def put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    data = draw(st.sampled_from(bases()))
    for _ in range(draw(st.integers(1, 4))):
        change = draw(st.sampled_from(CHANGES))
        data = change(draw, data) if data else data
    return data


def flip_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    for _ in range(draw(st.integers(1, 8))):
        data = put(data, draw(st.integers(0, len(data) - 1)), bytes([draw(st.integers(0, 255))]))
    return data


def change_number(draw: st.DrawFn, data: bytes) -> bytes:
    """Write a special number into the content of a box that is not the frames."""
    found = [box for box in boxes(data) if box.name != b"mdat"]
    if not found:
        return data
    box = draw(st.sampled_from(found))
    at = box.begin + 4 * draw(st.integers(0, max(0, (box.end - box.begin) // 4 - 1)))
    return put(data, at, struct.pack(">I", draw(st.sampled_from(SIZES))))[: len(data)]


def resize_box(draw: st.DrawFn, data: bytes) -> bytes:
    found = boxes(data)
    if not found:
        return data
    box = draw(st.sampled_from(found))
    size = draw(st.sampled_from(SIZES) | st.integers(0, 2 * len(data)))
    data = put(data, box.begin - 8, struct.pack(">I", size))
    if size == 1:  # 64 bits follow, negative ones among them
        data = put(data, box.begin, struct.pack(">Q", draw(st.integers(0, (1 << 64) - 1))))
    return data


def repeat_box(draw: st.DrawFn, data: bytes) -> bytes:
    found = boxes(data)
    if not found:
        return data
    box = draw(st.sampled_from(found))
    whole = data[box.begin - 8 : box.end]
    return data[: box.end] + whole * draw(st.integers(1, 3)) + data[box.end :]


def nest_boxes(draw: st.DrawFn, data: bytes) -> bytes:
    name = draw(st.sampled_from([b"moov", b"trak", b"moof", b"udta", b"meta", b"cmov"]))
    for _ in range(draw(st.integers(1, 200))):
        data = struct.pack(">I", 8 + len(data)) + name + data
    return data


def cut(draw: st.DrawFn, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def remove(draw: st.DrawFn, data: bytes) -> bytes:
    start, stop = sorted(draw(st.integers(0, len(data))) for _ in range(2))
    return data[:start] + data[stop:]


CHANGES: list[Callable[[st.DrawFn, bytes], bytes]] = [
    *(flip_bytes, change_number, resize_box, repeat_box, nest_boxes, cut, remove),
    *(change_number, resize_box),
]


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Fail if what is done here takes much memory, whatever this process has used before."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from now on
    before = peak_memory()
    yield
    assert peak_memory() - before < MEMORY


def peak_memory() -> int:
    """Most bytes of memory that this process has had at a time."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@bounded_memory()
def check(data: bytes) -> None:
    found = probe(data, 1, LIMITS)
    if isinstance(found, Rejected):
        assert found.reason
        assert found.detail
        return
    assert isinstance(found, VideoInfo)
    for read in (decode, locate_frames):
        with contextlib.suppress(DecodeError):
            read(data, found, [0, found.num_frames - 1])


@pytest.fixture
def memory_is_bounded():
    with bounded_memory():
        yield


def fuzz(examples: int) -> None:
    set_level(None)
    settings(QUICK, max_examples=examples)(given(mutated())(check))()


def test_some_changes_of_an_mp4() -> None:
    fuzz(300)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_thousand_changes_of_an_mp4() -> None:
    fuzz(10_000)


def table_of(mp4: bytes, name: bytes, at: int, number: int) -> bytes:
    """An mp4 with a number in a table, at an offset in the content of its box."""
    box = next(box for box in boxes(mp4) if box.name == name)
    return put(mp4, box.begin + at, struct.pack(">I", number))


@functools.cache
def bombs() -> dict[str, bytes]:
    plain, *_, fragmented = bases()[:4]
    sized = table_of(table_of(plain, b"stsz", 4, 1), b"stsz", 8, 150_000_000)
    moov = next(box for box in boxes(plain) if box.name == b"moov")
    index = plain[moov.begin : moov.end] + bytes(100 << 20)
    packed = struct.pack(">I", len(index)) + zlib.compress(index)
    packed = struct.pack(">I", 8 + len(packed)) + b"cmvd" + packed
    method = struct.pack(">I", 12) + b"dcomzlib"
    cmov = struct.pack(">I", 8 + len(method + packed)) + b"cmov" + method + packed
    compressed = plain[: moov.begin - 8] + struct.pack(">I", 8 + len(cmov)) + b"moov" + cmov
    return {
        "samples of one size": sized,
        "samples of the size 0": table_of(plain, b"stsz", 8, 1 << 31),
        "samples of a fragment": table_of(fragmented, b"trun", 4, (1 << 32) - 1),
        "edits": table_of(plain, b"elst", 4, 1 << 31),
        "a compressed index": compressed,
    }


@pytest.mark.usefixtures("memory_is_bounded")
def test_a_table_that_announces_the_impossible_is_refused_unopened(monkeypatch) -> None:
    assert len(bombs()) == 5
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("the file was opened"))
    for name, data in bombs().items():
        found = probe(data, 1)
        assert isinstance(found, Rejected), name
        assert found.reason == "unreadable", name


@pytest.mark.usefixtures("memory_is_bounded")
def test_huge_frames_and_years_are_refused() -> None:
    data = make_video(None, FRAMES, size=(SIDE, SIDE))
    wide = table_of(table_of(data, b"tkhd", 76, 16384 << 16), b"tkhd", 80, 16384 << 16)
    entry = wide.rindex(b"avc1") + 28
    assert wide[entry : entry + 4] == struct.pack(">HH", SIDE, SIDE)
    announced = probe(put(wide, entry, struct.pack(">HH", 16384, 16384)), 1)
    assert announced == probe(data, 1) or isinstance(announced, Rejected)  # the frames decide
    long = table_of(table_of(data, b"mvhd", 16, (1 << 32) - 1), b"mdhd", 16, (1 << 32) - 1)
    found = probe(table_of(long, b"stts", 12, 1 << 29), 1)
    assert isinstance(found, Rejected)
    assert found.reason in ("too_long", "truncated", "odd_rate")


@pytest.mark.usefixtures("memory_is_bounded")
def test_a_jpeg_of_huge_sides_takes_no_memory() -> None:
    data = make_video(None, FRAMES, size=(SIDE, SIDE), codec="mjpeg")
    ours, theirs = struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 60_000, 60_000)
    found = probe(data.replace(b"\xff\xc0\x00\x11\x08" + ours, b"\xff\xc0\x00\x11\x08" + theirs), 1)
    assert isinstance(found, Rejected)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "JPEG"])
def test_a_picture_is_no_video(kind: str) -> None:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, kind)
    found = probe(file.getvalue(), 1)
    assert isinstance(found, Rejected)
    assert found.reason == "unreadable"


def test_sound_that_quicktime_counts_by_instants_is_no_bomb() -> None:
    """Old movies count more instants of compressed sound than the file has bytes."""
    video = make_video(None, FRAMES, size=(SIDE, SIDE))
    handler = next(box for box in boxes(video) if box.name == b"hdlr")
    sound = put(video, handler.begin + 8, b"soun")
    sound = table_of(table_of(sound, b"stts", 4, 1), b"stts", 12, 1)
    sound = table_of(table_of(sound, b"stsz", 4, 1), b"stsz", 8, 1 << 24)
    assert structure.impossible_table(sound) is None
    assert structure.impossible_table(table_of(sound, b"stts", 12, 2)) is not None


def test_a_frame_of_a_good_base_is_read() -> None:
    for data in bases():
        info = probe(data, 1)
        assert isinstance(info, VideoInfo)
        assert whole_frames(decode(data, info, [FRAMES - 1])).shape == (1, SIDE, SIDE, 3)
