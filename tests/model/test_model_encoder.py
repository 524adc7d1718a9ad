"""The encoder against a slow restatement of the method, step by step and as a whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from svfap_dist.model import autoencoder, classifier
from svfap_dist.model.encoder import Encoder, SpatialBottleneck, StageFusion, TemporalDownsample
from svfap_dist.model.sizes import resolve

Weights = Mapping[str, Tensor]


def _randomise(module: torch.nn.Module) -> None:
    """Give every parameter a value at which a forgotten bias or norm would show."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def _norm(x: Tensor, w: Weights, name: str) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    scaled = centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def _mlp(x: Tensor, w: Weights, name: str) -> Tensor:
    hidden = F.gelu(x @ w[f"{name}.fc1.weight"].T + w[f"{name}.fc1.bias"])
    return hidden @ w[f"{name}.fc2.weight"].T + w[f"{name}.fc2.bias"]


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    width = q.shape[-1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bnd,bkd->bnk", q[..., part], k[..., part]) / width**0.5
        outputs.append(torch.einsum("bnk,bkd->bnd", scores.softmax(-1), v[..., part]))
    return torch.cat(outputs, -1)


def _block(x: Tensor, context: Tensor | None, w: Weights, name: str, heads: int) -> Tensor:
    if context is not None:
        n, c = f"{name}.cross_attn", _norm(context, w, f"{name}.cross_norm2")
        q = _norm(x, w, f"{name}.cross_norm1") @ w[f"{n}.q.weight"].T + w[f"{n}.q_bias"]
        wk, wv = w[f"{n}.kv.weight"].chunk(2)
        mixed = _attention(q, c @ wk.T, c @ wv.T + w[f"{n}.v_bias"], heads)
        x = x + mixed @ w[f"{n}.proj.weight"].T + w[f"{n}.proj.bias"]
    n, y = f"{name}.attn", _norm(x, w, f"{name}.norm1")
    wq, wk, wv = w[f"{n}.qkv.weight"].chunk(3)
    mixed = _attention(y @ wq.T + w[f"{n}.q_bias"], y @ wk.T, y @ wv.T + w[f"{n}.v_bias"], heads)
    x = x + mixed @ w[f"{n}.proj.weight"].T + w[f"{n}.proj.bias"]
    return x + _mlp(_norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")


def _stages(x: Tensor, encoder: Encoder, heads: int, kernel: int) -> list[Tensor]:
    """All stages of the method for embedded tokens x [B, T*s, D], one frame at a time."""
    w, t, number = encoder.state_dict(), encoder.num_tubelets, 0
    for _ in range(encoder.stage_depths[0]):
        x = _block(x, None, w, f"blocks.{number}", heads)
        number += 1
    stages = [x]
    for stage, depth in enumerate(encoder.stage_depths[1:]):
        name = f"temporal_downsamples.{stage}"
        frames = list(x.chunk(t, dim=1))
        merged = [
            sum(frames[i * kernel + j] @ w[f"{name}.weight"][:, :, j].T for j in range(kernel))
            + w[f"{name}.bias"]
            for i in range(t // kernel)
        ]
        name = f"spatial_downsamples.{stage}"
        summaries = []
        for frame in merged:  # [B, s, D]
            weights = _mlp(_norm(frame, w, f"{name}.norm"), w, f"{name}.mlp").softmax(1)
            summaries.append(torch.einsum("bsz,bsd->bzd", weights, frame))
        x, z, t = torch.cat(merged, 1), torch.cat(summaries, 1), t // kernel
        for _ in range(depth - 1):
            z = _block(z, x, w, f"blocks.{number}", heads)
            number += 1
        x = _block(x, z, w, f"blocks.{number}", heads)
        number += 1
        stages.append(x)
    return stages


@pytest.mark.parametrize(
    ("overrides", "kernel"),
    [
        ({}, 2),
        ({"stage_depths": (1, 3), "temporal_kernel_size": 4, "num_bottleneck_tokens": 3}, 4),
        ({"stage_depths": (2,)}, 2),
        ({"stage_depths": (1, 1, 1, 1)}, 2),
    ],
)
def test_all_stages_equal_the_restated_method(overrides: dict[str, object], kernel: int) -> None:
    torch.manual_seed(0)
    size = resolve("nano", {"frame_size": 48, **overrides})
    encoder = Encoder(size).double()
    _randomise(encoder)
    clips = torch.randn(2, 3, 16, 48, 48, dtype=torch.float64)
    stages = encoder(clips)
    expected = _stages(encoder.patch_embed(clips), encoder, size.num_heads, kernel)
    assert len(stages) == len(size.stage_depths)
    for k, (stage, oracle) in enumerate(zip(stages, expected, strict=True)):
        assert stage.shape == (2, 8 // kernel**k * 9, 32)
        torch.testing.assert_close(stage, oracle)


def test_visible_tokens_go_the_same_way(tubes: Callable[..., tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    size = resolve("nano", {"frame_size": 64})
    encoder = Encoder(size).double()
    _randomise(encoder)
    clips = torch.randn(2, 3, 16, 64, 64, dtype=torch.float64)
    visible, _ = tubes(size, 2, 3)
    everything = encoder.patch_embed(clips)
    tokens = torch.stack([everything[b, visible[b]] for b in range(2)])
    expected = _stages(tokens, encoder, size.num_heads, 2)
    for stage, oracle in zip(encoder(clips, visible), expected, strict=True):
        torch.testing.assert_close(stage, oracle)


def test_temporal_downsample_is_a_strided_convolution() -> None:
    merge = TemporalDownsample(6, 2)
    x = torch.randn(2, 8, 5, 6)  # [B, t, s, D]
    lanes = x.permute(0, 2, 3, 1).flatten(0, 1)  # [B*s, D, t]
    expected = F.conv1d(lanes, merge.weight, merge.bias, stride=2).unflatten(0, (2, 5))
    torch.testing.assert_close(merge(x), expected.permute(0, 3, 1, 2))


def test_bottleneck_tokens_lie_within_their_own_frame() -> None:
    torch.manual_seed(0)
    condense = SpatialBottleneck(8, 3)
    x = torch.full((1, 4, 5, 8), 7.0)
    x[0, 2] = 11.0
    z = condense(x)
    assert z.shape == (1, 4, 3, 8)
    torch.testing.assert_close(z[0, 2], torch.full((3, 8), 11.0))  # a mean of equals is the same
    torch.testing.assert_close(z[0, 1], torch.full((3, 8), 7.0))


def _fuse_by_loops(stages: list[Tensor], num_tubelets: int, fusion: StageFusion) -> Tensor:
    """For each tubelet frame and position, the sum over stages of the frame it came from."""
    positions = stages[0].shape[1] // num_tubelets
    fused = torch.empty_like(stages[0])
    for t in range(num_tubelets):
        for s in range(positions):
            total = torch.zeros_like(fused[:, 0])
            for stage in stages:
                frames = stage.shape[1] // positions
                source = t * frames // num_tubelets
                total = total + stage[:, source * positions + s]
            fused[:, t * positions + s] = total
    return fusion.norm(fused)


def test_fusion_repeats_in_time_and_keeps_the_order_of_tokens() -> None:
    fusion = StageFusion(4, num_tubelets=8)
    stages = [torch.randn(2, frames * 3, 4) for frames in (8, 4, 2)]
    torch.testing.assert_close(fusion(stages), _fuse_by_loops(stages, 8, fusion))


def test_the_fusion_oracle_sees_the_scrambled_order() -> None:
    """The released defect: coarse tokens repeated as one run, regrouped with the wrong length."""
    fusion = StageFusion(4, num_tubelets=8)
    stages = [torch.randn(2, frames * 3, 4) for frames in (8, 4, 2)]
    finest = stages[0].shape[1]
    scrambled = sum(stage.repeat(1, finest // stage.shape[1], 1) for stage in stages)
    assert not torch.allclose(fusion.norm(scrambled), _fuse_by_loops(stages, 8, fusion))


def test_pre_trained_state_fills_the_classifiers_encoder() -> None:
    torch.manual_seed(0)
    pretrained = autoencoder.build("nano", frame_size=64)
    model = classifier.build("nano", 7, frame_size=64)
    result = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert sorted(result.missing_keys) == [
        "fc_norm.bias",
        "fc_norm.weight",
        "head.bias",
        "head.weight",
    ]
    assert all(key.startswith(("fusion.", "decoder.")) for key in result.unexpected_keys)
