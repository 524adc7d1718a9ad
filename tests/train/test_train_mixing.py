"""Mixing: what clips and targets become, with constant clips, and how often."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svfap_dist.config import FinetuneConfig
from svfap_dist.rng import Stream
from svfap_dist.train import mixing

MIXUP = FinetuneConfig(mixup=0.8, cutmix=0)
CUTMIX = FinetuneConfig(mixup=0, cutmix=1.0)
VALUES = torch.tensor([0.0, 40.0, 100.0, 200.0])  # of the clips, each constant
TARGETS = torch.eye(4)


def _clips(dtype: torch.dtype) -> Tensor:
    """Four constant clips of eight frames, 12 pixels high and 16 wide."""
    shape = (4, 8, 12, 16, 3) if dtype is torch.uint8 else (4, 3, 8, 12, 16)
    return VALUES.view(4, 1, 1, 1, 1).expand(shape).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixup_averages_all_pixels_as_it_does_targets(dtype: torch.dtype) -> None:
    shares = set()
    for step in range(20):
        clips, targets = mixing.mix(_clips(dtype), TARGETS, Stream("mixup", step), MIXUP)
        assert clips.dtype is dtype
        share = targets[0, 0].item()
        expected = share * VALUES + (1 - share) * VALUES.flip(0)
        tolerance = 0.51 if dtype is torch.uint8 else 1e-4
        off = clips.float() - expected.view(4, 1, 1, 1, 1)
        assert off.abs().max() < tolerance
        torch.testing.assert_close(targets, share * TARGETS + (1 - share) * TARGETS.flip(0))
        shares.add(share)
    assert len(shares) == 20


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_cutmix_takes_one_box_from_the_partner_and_its_area_of_the_target(
    dtype: torch.dtype,
) -> None:
    mixed = 0
    for step in range(40):
        before = _clips(dtype)
        clips, targets = mixing.mix(before, TARGETS, Stream("cutmix", step), CUTMIX)
        assert torch.equal(before, _clips(dtype)), "the batch given stays as it was"
        # [4, frames or channels, the other, rows, columns]
        planes = clips.permute(0, 1, 4, 2, 3).float() if dtype is torch.uint8 else clips
        taken = planes != VALUES.view(4, 1, 1, 1, 1)
        partners = VALUES.flip(0).view(4, 1, 1, 1, 1).expand_as(planes)
        assert torch.equal(planes[taken], partners[taken])
        box = taken[0, 0, 0]
        assert torch.equal(taken, box.expand_as(taken)), "the same box everywhere"
        assert box.sum() == box.any(0).sum() * box.any(1).sum(), "a rectangle"
        share = 1 - box.float().mean().item()
        torch.testing.assert_close(targets, share * TARGETS + (1 - share) * TARGETS.flip(0))
        mixed += box.any().item()
    assert mixed > 30


def test_boxes_have_the_size_that_the_share_asks_for() -> None:
    areas = []
    for step in range(300):
        box = mixing.cut_box(Stream("box", step), 0.64, 100, 200)  # sides are 0.6 of the frame's
        assert 0 <= box.top <= box.top + box.height <= 100
        assert 0 <= box.left <= box.left + box.width <= 200
        assert 30 <= box.height <= 60
        assert 60 <= box.width <= 120
        areas.append(box.height * box.width)
    assert max(areas) == 60 * 120
    # Around a uniform pixel, a side of 0.6 keeps 0.6 - 0.3**2 = 0.51 of the frame's on average.
    assert abs(sum(areas) / 300 / 20_000 - 0.51**2) < 0.02


def test_the_middle_clip_of_an_odd_batch_mixes_with_itself() -> None:
    clips, targets = mixing.mix(_clips(torch.float32)[:3], TARGETS[:3], Stream(0), MIXUP)
    torch.testing.assert_close(clips[1], _clips(torch.float32)[1])
    torch.testing.assert_close(targets[1], TARGETS[1])


def _kind(step: int, finetune: FinetuneConfig) -> str:
    before = _clips(torch.float32)
    clips, targets = mixing.mix(before, TARGETS, Stream("kind", step), finetune)
    if clips is before:
        assert targets is TARGETS
        return "none"
    return "cutmix" if set(clips.unique().tolist()) <= set(VALUES.tolist()) else "mixup"


def _counts(finetune: FinetuneConfig, steps: int = 400) -> dict[str, int]:
    kinds = [_kind(step, finetune) for step in range(steps)]
    return {kind: kinds.count(kind) for kind in ("none", "cutmix", "mixup")}


def test_batches_are_mixed_as_often_as_configured() -> None:
    assert _counts(FinetuneConfig(mixup=0, cutmix=0), 10)["none"] == 10
    assert _counts(MIXUP, 10)["mixup"] == 10
    assert _counts(CUTMIX, 10)["cutmix"] == 10
    counts = _counts(FinetuneConfig(mix_probability=0.8, cutmix_probability=0.25))
    for kind, expected in {"none": 80, "cutmix": 80, "mixup": 240}.items():
        assert abs(counts[kind] - expected) < 40  # standard deviation 10 at most


def test_shares_of_mixup_follow_their_beta_distribution() -> None:
    shares = [
        mixing.mix(_clips(torch.float32)[:2], torch.eye(2), Stream("share", i), MIXUP)[1][0, 0]
        for i in range(1500)
    ]
    values = torch.stack(shares)
    assert abs(values.mean() - 0.5) < 0.04
    assert abs(values.var() - 0.25 / 2.6) < 0.01  # of beta(0.8, 0.8)


def test_smoothing_spreads_a_part_of_the_target_over_all_classes() -> None:
    targets = mixing.soft_targets(torch.tensor([2, 0]), 4, 0.1)
    expected = torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]])
    torch.testing.assert_close(targets, expected)
    assert math.isclose(targets.sum().item(), 2, rel_tol=1e-6)


@pytest.mark.parametrize("kind", [MIXUP, CUTMIX])
def test_each_clip_is_mixed_with_a_share_of_its_own(kind: FinetuneConfig) -> None:
    """The share depends on the clip's stream only: not on its place, nor on the batch."""
    before = _clips(torch.float32)

    def mixed(rows: list[int], step: int) -> tuple[Tensor, Tensor]:
        streams = [Stream("clip", step, row) for row in rows]
        return mixing.mix_each(before[rows], TARGETS[rows], streams, kind)

    shares = set()
    for step in range(20):
        clips, targets = mixed([0, 1, 2, 3], step)
        assert torch.equal(before, _clips(torch.float32)), "the batch given stays as it was"
        own = targets.diagonal()
        expected = own.view(4, 1) * TARGETS + (1 - own.view(4, 1)) * TARGETS.flip(0)
        torch.testing.assert_close(targets, expected)
        # In CutMix, too: a share of the pixels is that share of their mean.
        torch.testing.assert_close(clips.mean((1, 2, 3, 4)), targets @ VALUES, atol=1e-3, rtol=0)
        if kind is CUTMIX:
            for clip, value, partner in zip(clips, VALUES, VALUES.flip(0), strict=True):
                box = clip[0, 0] != value
                assert torch.equal(clip, torch.where(box, partner, value).expand_as(clip))
                assert box.sum() == box.any(0).sum() * box.any(1).sum(), "a rectangle"
        _, others = mixed([2, 0], step)
        torch.testing.assert_close(others[:, [2, 0]].diagonal(), own[[2, 0]])
        shares |= set(own.tolist())
    assert len(shares) > 20


def test_mixing_each_clip_may_be_off_or_rare() -> None:
    before = _clips(torch.float32)
    streams = [Stream("rare", row) for row in range(4)]
    off = FinetuneConfig(mixup=0, cutmix=0)
    for kind in (off, FinetuneConfig(mix_probability=0.0)):
        clips, targets = mixing.mix_each(before, TARGETS, streams, kind)
        assert torch.equal(clips, before)
        assert torch.equal(targets, TARGETS)
