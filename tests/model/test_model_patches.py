"""Normalizing, gathering and embedding patches, each against its slow restatement."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from svfap_dist.errors import ConfigError
from svfap_dist.model import patches
from svfap_dist.model.sizes import Size, resolve


def _size(**overrides: int) -> Size:
    return resolve("nano", {"stage_depths": (1,), **overrides})


def test_normalize_is_imagenet_statistics_and_invertible() -> None:
    frames = torch.randint(0, 256, (2, 4, 8, 8, 3), dtype=torch.uint8)
    clips = patches.normalize(frames)
    assert clips.shape == (2, 3, 4, 8, 8)
    assert clips.dtype == torch.float32
    value = frames[1, 2, 3, 4, 1].item() / 255
    assert clips[1, 1, 2, 3, 4].item() == pytest.approx((value - 0.456) / 0.224, abs=1e-6)
    restored = (patches.denormalize(clips) * 255).round().to(torch.uint8)
    assert torch.equal(restored.permute(0, 2, 3, 4, 1), frames)


def test_denormalize_takes_channels_in_any_dimension() -> None:
    clips = torch.randn(2, 3, 4, 8, 8)
    moved = patches.denormalize(clips.movedim(1, 3), channel_dim=3)
    assert torch.equal(moved.movedim(3, 1), patches.denormalize(clips))


def _patch_by_slicing(clip: Tensor, token: int, tubelet_size: int, patch_size: int) -> Tensor:
    """The patch [3, pt, p, p] of token n = t*S + row*columns + column of a clip [3, F, H, W]."""
    rows, columns = clip.shape[2] // patch_size, clip.shape[3] // patch_size
    t, patch = divmod(token, rows * columns)
    row, column = divmod(patch, columns)
    return clip[
        :,
        t * tubelet_size : (t + 1) * tubelet_size,
        row * patch_size : (row + 1) * patch_size,
        column * patch_size : (column + 1) * patch_size,
    ]


@settings(max_examples=25, deadline=None)
@given(
    tubelet_size=st.integers(1, 2),
    patch_size=st.integers(1, 4),
    num_tubelets=st.integers(1, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 3),
    data=st.data(),
)
def test_gathered_patches_are_the_slices_that_the_token_order_says(
    tubelet_size: int,
    patch_size: int,
    num_tubelets: int,
    rows: int,
    columns: int,
    data: st.DataObject,
) -> None:
    clips = torch.randn(2, 3, num_tubelets * tubelet_size, rows * patch_size, columns * patch_size)
    index = st.integers(0, num_tubelets * rows * columns - 1)
    one = data.draw(st.lists(index, min_size=1, max_size=4))
    tokens = torch.tensor([one, one[::-1]])
    gathered = patches._gather_patches(clips, tokens, (tubelet_size, patch_size))
    frames = clips.permute(0, 2, 3, 4, 1).contiguous()  # [B, F, H, W, 3]
    by_row = patches._gather_rows(frames, tokens, (tubelet_size, patch_size))
    assert by_row.shape[2:] == (tubelet_size * patch_size, patch_size * 3)
    everything = patches.patchify(clips, (tubelet_size, patch_size))
    for b, k in [(b, k) for b in range(2) for k in range(len(one))]:
        expected = _patch_by_slicing(clips[b], int(tokens[b, k]), tubelet_size, patch_size)
        assert torch.equal(gathered[b, k], expected)
        assert torch.equal(by_row[b, k].flatten(), expected.permute(1, 2, 3, 0).flatten())
        assert torch.equal(everything[b, tokens[b, k]], expected.permute(1, 2, 3, 0).flatten())


def test_gather_then_embed_equals_convolution_then_gather() -> None:
    torch.manual_seed(0)
    embed = patches.PatchEmbed(_size(num_frames=8, frame_size=64, embed_dim=24))
    clips = torch.randn(2, 3, 8, 64, 64)
    dense = F.conv3d(clips, embed.proj.weight, embed.proj.bias, stride=(2, 16, 16))
    dense = dense.flatten(2).transpose(1, 2) + patches.sine_cosine_table(64, 24)  # [B, N, D]
    torch.testing.assert_close(embed(clips), dense, atol=1e-5, rtol=1e-5)
    tokens = torch.stack([torch.randperm(64)[:10].sort().values for _ in range(2)])
    gathered = torch.stack([dense[b, tokens[b]] for b in range(2)])
    torch.testing.assert_close(embed(clips, tokens), gathered, atol=1e-5, rtol=1e-5)


def test_frames_give_the_tokens_of_the_clips_that_they_become() -> None:
    torch.manual_seed(0)
    embed = patches.PatchEmbed(_size(num_frames=8, frame_size=64, embed_dim=24))
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    clips = patches.normalize(frames)
    tokens = torch.stack([torch.randperm(64)[:10].sort().values for _ in range(2)])
    assert torch.equal(embed(frames, tokens), embed(clips, tokens))
    assert torch.equal(embed(frames), embed(clips))


def test_position_table_is_the_formula() -> None:
    table = patches.sine_cosine_table(50, 12)
    for position in range(50):
        for j in range(12):
            angle = position / 10000 ** (2 * (j // 2) / 12)
            expected = math.cos(angle) if j % 2 else math.sin(angle)
            assert table[position, j].item() == pytest.approx(expected, abs=1e-6)


def test_position_table_is_no_part_of_the_state() -> None:
    embed = patches.PatchEmbed(_size(num_frames=4, frame_size=32, embed_dim=8))
    assert set(embed.state_dict()) == {"proj.weight", "proj.bias"}
    assert embed.proj.weight.shape == (8, 3, 2, 16, 16)


def test_patches_are_checked_without_the_weight() -> None:
    """ZeRO-3 leaves it empty until the layer runs."""
    size = _size()
    embed = patches.PatchEmbed(size)
    embed.proj.weight.data = torch.empty(0)
    values = size.tubelet_size * size.patch_size**2 * 3
    tokens = torch.arange(4).expand(2, 4)
    embed._check(torch.zeros(2, 4, values), tokens)
    with pytest.raises(ConfigError, match="patches"):
        embed._check(torch.zeros(2, 4, values + 1), tokens)


def test_clips_of_another_shape_are_refused() -> None:
    embed = patches.PatchEmbed(_size(num_frames=4, frame_size=32, embed_dim=8))
    with pytest.raises(ConfigError, match=r"shape \(2, 3, 4, 48, 48\).*\[B, 3, 4, 32, 32\]"):
        embed(torch.randn(2, 3, 4, 48, 48))
    with pytest.raises(ConfigError, match=r"uint8 of shape \(2, 4, 48, 48, 3\).*4, 32, 32, 3\]"):
        embed(torch.zeros(2, 4, 48, 48, 3, dtype=torch.uint8))
