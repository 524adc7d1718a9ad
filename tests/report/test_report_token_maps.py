"""Token maps: shares that sum to one, in the right places, on a sheet of the right size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from svfap_dist.model import autoencoder
from svfap_dist.model.layers import Attention
from svfap_dist.report import token_maps
from svfap_dist.video import image_grid


@pytest.fixture
def clips() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 3, 16, 64, 64)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, [("attention 1", 8), ("tokens 2", 8), ("tokens 3", 8)]),
        (
            {"num_bottleneck_tokens": [12, 3]},
            [("attention 1", 8), ("tokens 2", 8), ("tokens 3", 3)],
        ),
        ({"bottleneck": False}, [("attention 1", 8), ("attention 2", 4), ("attention 3", 2)]),
        ({"encoder": "vit"}, [("attention 1", 8)]),
    ],
)
def test_a_row_for_each_stage(overrides, expected, clips):
    model = autoencoder.build("nano", frame_size=64, **overrides)
    encoder = model.encoder
    rows = token_maps.rows(encoder, model.size.encoder, clips)
    assert [(row.label, len(row.maps)) for row in rows] == expected
    for row in rows:
        assert row.maps.shape[1:] == (4, 4)
        np.testing.assert_allclose(row.maps.mean(axis=(1, 2)), 1, atol=1e-5)  # even shares: 1
        assert len(row.frames) == len(row.maps)
    assert rows[0].frames == [1, 3, 5, 7, 9, 11, 13, 15]
    assert not any(module._forward_pre_hooks for module in encoder.modules())


def test_maps_are_brightest_where_the_tokens_come_from(clips):
    """With weights that follow the pixels, the map of a bright patch is bright there."""
    encoder = autoencoder.build("nano", frame_size=64, stage_depths=[1, 1]).encoder
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()
        encoder.patch_embed.proj.weight.fill_(0.01)
        encoder.patch_embed.table.zero_()
        encoder.patch_embed.proj.weight[::2].zero_()
        encoder.temporal_downsamples[0].weight.copy_(torch.eye(32).unsqueeze(2).expand(32, 32, 2))
        condense = encoder.spatial_downsamples[0]
        condense.norm.weight.fill_(1)
        condense.mlp.fc1.weight[:, 1::2].fill_(0.1)
        condense.mlp.fc2.weight.fill_(1)
    clips.zero_()
    clips[..., 16:32, 48:64] = 1  # row 1, column 3
    tokens = token_maps.rows(encoder, "tpsbt", clips)[1]
    assert tokens.label == "tokens 2"
    for heat in tokens.maps:
        assert np.unravel_index(heat.argmax(), heat.shape) == (1, 3)


def test_attention_received_is_the_softmax_that_the_layer_uses():
    """A layer whose values are one-hot hands its attention on as its output."""
    torch.manual_seed(0)
    attention = Attention(8, 2)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 5, 8)
    received = attention.received(x)
    q, k, _ = (x @ attention.qkv.weight.T).chunk(3, dim=-1)
    q = q + attention.q_bias
    expected = torch.zeros(3, 5)
    for clip in range(3):
        for head in range(2):
            part = slice(4 * head, 4 * head + 4)
            for query in range(5):
                scores = torch.stack([q[clip, query, part] @ k[clip, n, part] for n in range(5)])
                expected[clip] += (scores / 2).softmax(0) / 10
    torch.testing.assert_close(received, expected)


def test_the_sheet_shows_the_frames_and_each_row_over_its_frame():
    frames = np.zeros((4, 64, 64, 3), dtype=np.uint8)
    frames[2] = 200
    heat = np.zeros((2, 2, 2))
    heat[:, 0, 1] = 3.0
    rows = [token_maps.Row("attention 1", heat, [0, 2]), token_maps.Row("tokens 2", heat, [2, 2])]
    sheet = np.asarray(image_grid.draw_grid(token_maps.grid_rows(frames, rows, "face")))
    left = sheet.shape[1] - 2 * 66
    assert sheet.shape == (3 * 66, left + 2 * 66, 3)
    assert (sheet[:64, left : left + 64] == 0).all()
    assert (sheet[:64, left + 66 : left + 130] == 200).all()
    attention = sheet[66:130, left : left + 64].astype(int)
    hot, cold = attention[:32, 32:].sum(), attention[32:, :32].sum()
    assert hot > 4 * cold
    over_bright = sheet[66:130, left + 66 : left + 130].astype(int)
    assert over_bright[16:, :16].sum() > 2 * cold
