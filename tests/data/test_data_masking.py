"""Tube masks: the right number, equal patches in all tubelet frames, all tokens accounted for."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from svfap_dist.data.masking import tube
from svfap_dist.rng import Stream


@given(
    st.integers(0, 10**6),
    st.integers(1, 8),
    st.integers(2, 120),
    st.floats(0.05, 0.95),
)
def test_a_split_is_a_partition_with_equal_patches_in_every_frame(seed, tubelets, patches, ratio):
    split = tube(Stream(seed), tubelets, patches, ratio)
    together = np.concatenate([split.visible, split.masked])
    assert sorted(together.tolist()) == list(range(tubelets * patches))
    assert len(split.masked) == tubelets * round(patches * ratio)
    for tokens in (split.visible, split.masked):
        assert tokens.dtype == np.int64
        assert (np.diff(tokens) > 0).all()
        frames = [set((tokens[tokens // patches == t] % patches).tolist()) for t in range(tubelets)]
        assert all(frame == frames[0] for frame in frames)


def test_the_paper_masks_90_of_100_patches():
    split = tube(Stream("paper"), num_tubelets=8, num_patches=100, ratio=0.9)
    assert (split.visible.shape, split.masked.shape) == ((80,), (720,))


def test_masks_are_random_and_repeatable():
    def visible(key):
        return tuple(tube(Stream(key), 2, 36, 0.9).visible.tolist())

    assert visible(1) == visible(1)
    assert len({visible(key) for key in range(20)}) > 15


def test_every_patch_is_masked_equally_often():
    counts = np.zeros(10)
    for key in range(2000):
        counts[tube(Stream("even", key), 1, 10, 0.7).masked] += 1
    # 1400 expected, standard deviation 20.5
    assert np.abs(counts - 1400).max() < 100
