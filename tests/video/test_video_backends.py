"""The table of decode backends, and a backend that a test adds to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_data_loader import SIZES, config_of, loader_of

from svfap_dist.config import Config
from svfap_dist.video import backends
from svfap_dist.video.backends import BACKENDS, Backend, available, capabilities, open_decoder
from svfap_dist.video.dali import DaliDecoder
from svfap_dist.video.frames import DecodedBatch, RgbFrames

needs_dali = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")


class GrayDecoder:
    """A toy backend: each frame is as bright as its number."""

    def __init__(self, device: str, *, threads: int, pipelines: int) -> None:
        self._device = device

    def __call__(self, video, info, numbers) -> RgbFrames:
        levels = np.array(numbers, np.uint8)[:, None, None, None]
        return RgbFrames(levels.repeat(info.height, 1).repeat(info.width, 2).repeat(3, 3))

    def reserve(self, videos) -> None:
        self.reserved = videos

    def decode_batch(self, requests, size) -> DecodedBatch:
        clips = [
            torch.from_numpy(self(r.video, r.info, r.numbers).pixels[:, :size, :size].copy())
            for r in requests
            for _ in r.crops
        ]
        return DecodedBatch(torch.stack(clips).to(self._device), {})


FACTORY = f"{__name__}:GrayDecoder"
TOYS = {
    "on the host": Backend(FACTORY, decodes_on="host", codecs={"cpu": None}),
    "batched": Backend(FACTORY, decodes_on="device", codecs={"cpu": None}, batched=True),
}


@pytest.mark.parametrize("toy", TOYS)
def test_a_new_row_is_all_that_the_loader_needs(make_data_set, monkeypatch, toy):
    monkeypatch.setitem(BACKENDS, "gray", TOYS[toy])
    tables = config_of().model_dump()
    config = Config.model_validate({**tables, "decode": {"backend": "gray"}})
    loader = loader_of(make_data_set(SIZES), config)
    clip = next(loader.batches(0, 1)).frames[0]  # [F, S, S, 3]
    levels = clip[:, 0, 0, 0].tolist()
    stride = config.data.sampling_rate
    assert levels == list(range(levels[0], levels[0] + config.data.num_frames * stride, stride))
    assert (clip == clip[:, :1, :1, :1]).all()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, pyav, dali"):
        Config.model_validate({"decode": {"backend": "gray"}})


@needs_dali
def test_one_decoder_per_process():
    first = open_decoder("dali", "cpu", 1, 2)
    assert isinstance(first, DaliDecoder)
    assert open_decoder("dali", "cpu", 1, 2) is first
    assert open_decoder("auto") is open_decoder("pyav")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_available(device):
    with_dali = ["pyav", "dali"] if BACKENDS["dali"].is_installed else ["pyav"]
    assert available("vp9", device) == with_dali
    assert available("h264", device) == (with_dali if device == "cuda" else ["pyav"])
    assert available("theora", device) == ["pyav"]


def test_the_default_needs_nothing_and_decodes_everything():
    row = capabilities("auto")
    assert row is BACKENDS[backends.DEFAULT]
    assert row.is_installed
    assert not row.batched
    assert all(row.decodes("any", device) for device in ("cpu", "cuda"))


@pytest.mark.parametrize(
    ("name", "units"),
    [
        ("NVIDIA H100 80GB HBM3", 7),
        ("NVIDIA A100-SXM4-80GB", 5),
        ("NVIDIA A10", 2),
        ("NVIDIA L40S", 3),
        ("NVIDIA L4", 4),
        ("Tesla T4", 2),
        ("NVIDIA Unheard Of", 4),
    ],
)
def test_decoding_units_by_the_name_of_the_card(name, units):
    assert backends.decoding_units(name) == units


@pytest.mark.parametrize(
    ("codec", "pixel_format", "cards"),
    [
        # V100, T4, A100, A10, L4, H100, B200, RTX 5090
        ("h264", "yuv420p", "11111111"),
        ("hevc", "yuvj420p", "11111111"),
        ("mjpeg", "yuvj420p", "00000000"),  # they do, but DALI does not let them
        ("h264", "yuv420p10le", "00000011"),
        ("h264", "yuv444p", "00000000"),
        ("hevc", "yuv444p", "01111111"),
        ("av1", "yuv420p", "00011011"),
        ("theora", "yuv420p", "00000000"),
    ],
)
def test_what_decoding_units_decode(codec, pixel_format, cards):
    generations = ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
    row = BACKENDS["dali"]
    found = [row.decodes(codec, "cuda", pixel_format, gpu) for gpu in generations]
    assert "".join(str(int(each)) for each in found) == cards
    if not all(found):
        assert not row.decodes(codec, "cuda", pixel_format)  # of an unknown card, no promise
