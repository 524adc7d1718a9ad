"""Masks: the right number, the right places, all tokens accounted for, as many in every clip."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.config import Config, DataConfig, MaskConfig
from svfap_dist.data.masking import MASKS, Masking, TokenSplit, _running_cell, split_tokens
from svfap_dist.errors import ConfigError
from svfap_dist.rng import Stream

tube_mask, random_mask, frame_mask = (MASKS[k].split for k in ("tube", "random", "frame"))

GRID = (st.integers(0, 10**6), st.integers(1, 8), st.integers(2, 120), st.floats(0.05, 0.95))


def check_partition(parts, tubelets, patches):
    together = np.concatenate([parts.visible, parts.masked])
    assert sorted(together.tolist()) == list(range(tubelets * patches))
    for tokens in (parts.visible, parts.masked):
        assert tokens.dtype == np.int64
        assert (np.diff(tokens) > 0).all()


def by_frame(tokens, tubelets, patches):
    """Patches in each tubelet frame."""
    return [set((tokens[tokens // patches == t] % patches).tolist()) for t in range(tubelets)]


@given(*GRID)
def test_a_tube_is_equal_patches_in_every_frame(seed, tubelets, patches, ratio):
    parts = tube_mask(Stream(seed), tubelets, patches, ratio)
    check_partition(parts, tubelets, patches)
    assert len(parts.masked) == tubelets * round(patches * ratio)
    frames = by_frame(parts.visible, tubelets, patches)
    assert all(patches_seen == frames[0] for patches_seen in frames)


@given(*GRID)
def test_random_is_equally_many_patches_in_every_frame(seed, tubelets, patches, ratio):
    parts = random_mask(Stream(seed), tubelets, patches, ratio)
    check_partition(parts, tubelets, patches)
    for patches_masked in by_frame(parts.masked, tubelets, patches):
        assert len(patches_masked) == round(patches * ratio)


@given(*GRID)
def test_frame_is_all_patches_of_some_frames(seed, tubelets, patches, ratio):
    parts = frame_mask(Stream(seed), tubelets, patches, ratio)
    check_partition(parts, tubelets, patches)
    frames = by_frame(parts.masked, tubelets, patches)
    assert sorted(map(len, frames)) == sorted(
        [patches] * round(tubelets * ratio) + [0] * (tubelets - round(tubelets * ratio))
    )


def test_random_differs_between_frames():
    parts = random_mask(Stream("differs"), 8, 100, 0.9)
    assert len({frozenset(seen) for seen in by_frame(parts.visible, 8, 100)}) == 8


def test_the_paper_masks_90_of_100_patches():
    parts = tube_mask(Stream("paper"), num_tubelets=8, num_patches=100, ratio=0.9)
    assert (parts.visible.shape, parts.masked.shape) == ((80,), (720,))
    assert (
        split_tokens(Stream("paper"), MaskConfig(), 8, 100).visible.tolist()
        == parts.visible.tolist()
    )


@pytest.mark.parametrize(
    ("kind", "ratio"), [(tube_mask, 0.9), (random_mask, 0.9), (frame_mask, 0.5)]
)
def test_masks_are_random_and_repeatable(kind, ratio):
    def visible(key):
        return tuple(kind(Stream(key), 6, 36, ratio).visible.tolist())

    assert visible(1) == visible(1)
    assert len({visible(key) for key in range(20)}) > 10


@pytest.mark.parametrize(
    ("kind", "tubelets", "patches"),
    [(tube_mask, 1, 10), (random_mask, 1, 10), (frame_mask, 10, 1)],
)
def test_every_patch_is_masked_equally_often(kind, tubelets, patches):
    counts = np.zeros(10)
    for key in range(2000):
        counts[kind(Stream("even", key), tubelets, patches, 0.7).masked] += 1
    # 1400 expected, standard deviation 20.5
    assert np.abs(counts - 1400).max() < 100


def config_of(**mask):
    return Config(data=DataConfig(frame_size=112), mask=MaskConfig(**mask))


@pytest.mark.parametrize("kind", ["tube", "random", "frame"])
def test_the_recipe_names_the_kind(kind):
    config = config_of(kind=kind, ratio=0.5)
    made = MASKS[kind].split(Stream(1), 8, 49, 0.5)
    parts = split_tokens(Stream(1), config.mask, config.num_tubelets, config.num_patches)
    assert parts.visible.tolist() == made.visible.tolist()
    assert parts.masked.tolist() == made.masked.tolist()
    assert config.num_visible_tubelets == (4 if kind == "frame" else 8)


def cell_by_hand(tubelet: int, start: int, kept: int) -> str:
    """A cell of a tubelet frame, row by row: "x" where it is predicted."""
    cell = "x" * kept + "." * (4 - kept)
    for _ in range(start + tubelet):
        cell = cell[1:] + cell[0]  # it runs on by one place
    return cell


@pytest.mark.parametrize(("ratio", "kept"), [(0.25, 1), (0.5, 2), (0.75, 3)])
@pytest.mark.parametrize("side", [4, 7])
def test_the_decoder_predicts_a_running_cell(ratio, kept, side):
    everything = np.arange(8 * side * side)
    starts = set()
    for key in range(12):
        predicted = set(_running_cell(Stream(key), everything, side * side, ratio).tolist())
        start = Stream(key).integer(4)
        starts.add(start)
        for token in everything.tolist():
            tubelet, patch = divmod(token, side * side)
            row, column = divmod(patch, side)
            cell = cell_by_hand(tubelet, start, kept)
            assert (token in predicted) == (cell[row % 2 * 2 + column % 2] == "x")
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(5))
def test_dual_masking_spares_the_decoder_and_leaves_the_encoder_as_it_was(seed, ratio):
    config = config_of(decoder_ratio=ratio)
    whole = tube_mask(Stream(seed), 8, 49, config.mask.ratio)
    part = split_tokens(Stream(seed), config.mask, 8, 49)
    assert part.visible.tolist() == whole.visible.tolist()
    assert set(part.masked.tolist()) < set(whole.masked.tolist())
    assert (np.diff(part.masked) > 0).all()
    # Each masked tube equally often, so every clip has as many.
    patches, counts = np.unique(part.masked % 49, return_counts=True)
    assert len(patches) * 8 == len(whole.masked)
    assert (counts == 8 * ratio).all()


def test_a_kind_of_masks_is_one_row(monkeypatch):
    """A toy: the last tubelet frames are masked. The recipe's rules ask the row, not the name."""

    def last_frames(stream, num_tubelets, num_patches, ratio):
        visible = (num_tubelets - round(num_tubelets * ratio)) * num_patches
        tokens = np.arange(num_tubelets * num_patches)
        return TokenSplit(tokens[:visible], tokens[visible:])

    monkeypatch.setitem(MASKS, "last", Masking(last_frames, whole_frames=True))
    config = config_of(kind="last", ratio=0.25)
    parts = split_tokens(Stream(1), config.mask, config.num_tubelets, config.num_patches)
    assert parts.masked.tolist() == list(range(6 * 49, 8 * 49))
    assert config.num_visible_tubelets == 6
    with pytest.raises(ConfigError, match="of 8 tubelet frames"):
        config_of(kind="last", ratio=0.01)
