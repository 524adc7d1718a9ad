"""Videos made for training: the same frames in another order, small, repeatable, ordinary mp4."""

from __future__ import annotations

import dataclasses
import io
import pickle

import av
import numpy as np
import pytest
from clips import make_video, read_frame_number

from data_sharding.sources import synthetic
from data_sharding.transcode import TrainProfile, TranscodeError, split_phases, transcode
from svfap_dist.errors import ConfigError
from svfap_dist.video.info import (
    VideoInfo,
    dump_info,
    joined_info,
    load_info,
    separate_files,
    stored_position,
)
from svfap_dist.video.probe import probe

FULL = TrainProfile(region="full")


def info_of(video: bytes) -> VideoInfo:
    info = probe(video, 1)
    assert isinstance(info, VideoInfo), info
    return info


def shown(video: bytes) -> list[np.ndarray]:
    """All frames in RGB, as a player shows them."""
    with av.open(io.BytesIO(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize(("frames", "phases"), [(70, 4), (41, 4), (3, 4), (1, 4), (30, 1), (29, 7)])
def test_a_player_shows_the_frames_phase_by_phase(frames, phases):
    source = make_video(None, frames, encoder_options={"bf": "2"})
    video, _ = transcode(source, info_of(source), TrainProfile("full", phases=phases))
    pictures = shown(video)
    assert len(pictures) == frames
    for number in range(frames):
        position = stored_position(number, frames, phases)
        assert read_frame_number(pictures[position]) == number


@pytest.mark.parametrize(
    ("frames", "region"), [(168, "full"), (41, "full"), (3, "center"), (1, "centre")]
)
def test_each_phase_alone_is_a_short_video(frames, region):
    source = make_video(None, frames)
    video, info = transcode(source, info_of(source), TrainProfile(region))
    parts = split_phases(video, info)
    assert parts == split_phases(video, info)
    assert len(parts) == min(frames, 4)
    for phase, (part, described) in enumerate(parts):
        numbers = [read_frame_number(picture) for picture in shown(part)]
        assert numbers == list(range(phase, frames, 4))
        raw = dump_info(described)
        assert load_info(raw, part) == described
        assert len(raw) <= 512  # of a tar's block
    joined = joined_info([part[1] for part in parts], [len(part[0]) for part in parts])
    assert separate_files(b"".join(part[0] for part in parts), joined) == parts


def test_the_index_leads_to_the_packets():
    source = make_video(None, 150)
    video, info = transcode(source, info_of(source), dataclasses.replace(FULL, group=8))
    order = info.layout
    assert order is not None
    with av.open(io.BytesIO(video)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
        assert not container.streams.audio
    (file,) = order.files
    begin = file.first_byte
    for packet, size in zip(packets, file.packet_sizes, strict=True):
        assert bytes(packet) == video[begin : begin + size]
        begin += size
    keys = [
        stored_position(number, 150, 4) for number in range(150) if number // 4 % order.group == 0
    ]
    assert [k for k, packet in enumerate(packets) if packet.is_keyframe] == sorted(keys)
    assert order.group == 10  # 38 frames of a phase, in four groups


def test_equal_videos_give_equal_bytes_without_names():
    source = next(iter(synthetic.samples("clips=1,frames=24"))).read()
    first, second = (transcode(source, info_of(source), TrainProfile()) for _ in range(2))
    assert first == second
    assert b"x264" not in first[0]
    assert b"Lavf" not in first[0]


def test_quality_of_a_face():
    source = next(iter(synthetic.samples("clips=1,frames=40"))).read()
    video, info = transcode(source, info_of(source), TrainProfile())
    assert (info.width, info.height) == (160, 160)
    assert len(video) < 1.6 * len(source)
    wanted, got = shown(source), shown(video)
    errors = [
        (frame[:160, 32:192].astype(float) - got[stored_position(number, 40, 4)]) ** 2
        for number, frame in enumerate(wanted)
    ]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 37


def test_a_variable_rate_becomes_constant():
    """Frame i is the one on the screen at i / fps, as the decoder of sources has it."""
    pts = [0, 1, 2, 6, 7, 8, 9, 10, 14, 15]
    source = make_video(None, 10, pts=pts, encoder_options={"bf": "0"})
    info = info_of(source)
    assert not info.constant_frame_rate
    video, stored = transcode(source, info, FULL)
    assert stored.constant_frame_rate
    pictures = [read_frame_number(picture) for picture in shown(video)]
    expected = []
    for number in range(10):
        ticks = number / info.fps * 25 + 1e-3
        expected.append(sum(time <= ticks for time in pts) - 1)
    assert [pictures[stored_position(n, 10, 4)] for n in range(10)] == expected


@pytest.mark.parametrize(
    ("size", "region"), [((322, 242), "voxceleb2"), ((66, 48), "center"), ((64, 48), "full")]
)
def test_regions_lie_on_whole_chroma_samples(size, region):
    source = make_video(None, 3, size=size, encoder_options={"crf": "5"})
    video, info = transcode(source, info_of(source), TrainProfile(region, crf=5))
    order = info.layout
    assert order is not None
    assert order.region == region
    assert (order.source_width, order.source_height) == size
    assert (order.left % 2, order.top % 2, info.width % 2, info.height % 2) == (0, 0, 0, 0)
    rows, columns = slice(order.top, order.top + order.height), slice(order.left, None)
    cut = shown(source)[0][rows, columns][:, : order.width]
    assert np.abs(shown(video)[0].astype(int) - cut).mean() < 4


def test_odd_sizes_lose_a_row_and_a_column():
    frames = [np.full((33, 47, 3), 40 * k, np.uint8) for k in range(4)]
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("libvpx-vp9", rate=25)
        stream.width, stream.height, stream.pix_fmt = 47, 33, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    source = file.getvalue()
    video, info = transcode(source, info_of(source), FULL)
    assert (info.width, info.height) == (46, 32)
    levels = [picture.mean() for picture in shown(video)]
    assert levels == pytest.approx([0, 40, 80, 120], abs=3)


def test_frames_are_resized_where_asked():
    source = make_video(None, 5, size=(128, 96))
    video, info = transcode(source, info_of(source), TrainProfile("center", size=64))
    assert (info.width, info.height) == (64, 64)
    assert shown(video)[0].shape == (64, 64, 3)
    with pytest.raises(ConfigError, match="63"):
        TrainProfile(size=63)


def test_colors_are_said_again():
    source = make_video(
        None,
        3,
        encoder_options={"crf": "5", "colorspace": "bt709", "color_range": "pc"},
    )
    video, _ = transcode(source, info_of(source), dataclasses.replace(FULL, crf=5))
    for data in (source, video):
        with av.open(io.BytesIO(data)) as container:
            frame = next(container.decode(video=0))
            assert (frame.colorspace, frame.color_range) == (1, 2)
    assert np.abs(shown(video)[0].astype(int) - shown(source)[0]).mean() < 3


def test_the_json_comes_back():
    source = make_video(None, 9)
    info = dataclasses.replace(info_of(source), labels={"identity": "id1"})
    _, stored = transcode(source, info, FULL)
    assert stored.labels == {"identity": "id1"}
    assert load_info(dump_info(stored)) == stored


def test_videos_that_cannot_be_used_are_refused():
    source = make_video(None, 40)
    info = info_of(source)
    at = source.index(b"mdat") + len(source) // 2
    damaged = source[:at] + bytes(len(source) // 8) + source[at + len(source) // 8 :]
    for video, said, reason in [
        (damaged, info, "undecodable"),
        (b"junk", info, "undecodable"),
        (source, dataclasses.replace(info, num_frames=50), "undecodable"),
        (source, dataclasses.replace(info, width=60), "undecodable"),
        (source, dataclasses.replace(info, num_frames=10**9), "too_long"),
        (source, dataclasses.replace(info, height=1), "too_small"),
    ]:
        with pytest.raises(TranscodeError) as caught:
            transcode(video, said, FULL)
        assert pickle.loads(pickle.dumps(caught.value)).reason == reason
