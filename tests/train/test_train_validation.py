"""The validation clips: fixed samples, windows and masks, shared by the ranks."""

from __future__ import annotations

import contextlib
import io
import types
from typing import Any

import pytest
import torch
from loaders import NO_VIDEO, SIZES, bits, config_of, shown, world
from numbered_shards import FRAMES
from PIL import Image

from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.masking import MASKS
from svfap_dist.model import autoencoder
from svfap_dist.rng import Stream
from svfap_dist.train.objective import build_arguments
from svfap_dist.train.validation import ValidationSet, validation_batches
from svfap_dist.video import image_grid


def held_out(data_set, max_clips=11, rank=0, size=1) -> list[ClipBatch]:
    return validation_batches(
        config_of(), data_set.url, data_set.manifest, world(rank, size), max_clips
    )


def test_held_out_clips_are_the_first_samples_and_always_the_same(make_data_set):
    data_set = make_data_set(SIZES)
    batches = held_out(data_set)
    assert [bits(batch) for batch in held_out(data_set)] == [bits(batch) for batch in batches]
    assert [batch.slots.samples for batch in batches] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
        [10],
    ]
    start = (FRAMES - 7) // 2
    for batch in batches:
        assert shown(batch) == [[(i, start + 2 * k) for k in range(4)] for i in batch.slots.samples]
        for row, i in enumerate(batch.slots.samples):
            split = MASKS["tube"].split(Stream(3, "held-out", i), 2, 4, 0.5)
            assert batch.masked[row].tolist() == split.masked.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_share_the_held_out_clips(make_data_set, size):
    data_set = make_data_set(SIZES)
    alone = [row for batch in held_out(data_set) for row in bits(batch)]
    shared = [
        row
        for rank in range(size)
        for batch in held_out(data_set, rank=rank, size=size)
        for row in bits(batch)
    ]
    assert sorted(shared) == sorted(alone)


def test_bad_held_out_clips_are_left_out_and_listed(make_data_set):
    data_set = make_data_set(SIZES, replace=dict.fromkeys((1, 2, 3), NO_VIDEO))
    batches = held_out(data_set, max_clips=100)
    assert [i for batch in batches for i in batch.slots.samples] == [0, *range(4, 51)]
    assert [bad.index for batch in batches for bad in batch.bad] == [1]  # 2 and 3: no batch at all
    assert all(len(batch.keys) == len(batch.frames) for batch in batches)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_picture_that_cannot_be_drawn_costs_a_warning(make_data_set, monkeypatch, caplog, dtype):
    """An error of one rank would end the run, for a picture that only trackers show."""
    data_set = make_data_set(SIZES)
    config = config_of(eval_url=data_set.url, num_frames=8, sampling_rate=1)
    config = config.model_copy(update={"train": config.train.model_copy(update={"dtype": dtype})})
    network = autoencoder.build(**build_arguments(config)).to(getattr(torch, dtype))
    engine: Any = types.SimpleNamespace(
        device=torch.device("cpu"), eager_network=network, evaluating=contextlib.nullcontext
    )
    clips = ValidationSet(config, world(), data_set.manifest)
    with Image.open(io.BytesIO(clips.picture(engine) or b"")) as shown_picture:
        assert shown_picture.height >= 3 * config.data.frame_size

    def fail(*_: object) -> None:
        raise UnicodeEncodeError("latin-1", "\u4e00", 0, 1, "not in the font")

    monkeypatch.setattr(image_grid, "draw_grid", fail)
    assert clips.picture(engine) is None
    assert "No picture of the reconstruction: 'latin-1' codec" in caplog.text
