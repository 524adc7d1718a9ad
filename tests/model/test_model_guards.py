"""The three guards that must hold before any training, and proof that each of them can fail.

Masked pixels never reach the encoder; every parameter gets a gradient; patches can be put back
together. The planted defects are those found in the released pre-training code.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from svfap_dist.model import autoencoder, loss, patches
from svfap_dist.model.autoencoder import MaskedAutoencoder

Batch = tuple[Tensor, Tensor, Tensor]


@pytest.fixture
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return autoencoder.build("nano", frame_size=64)


@pytest.fixture
def batch(model: MaskedAutoencoder, tubes: Callable[..., tuple[Tensor, Tensor]]) -> Batch:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 64, 64), *tubes(model.size, clips=2, visible_per_frame=5)


def _replace_patches(clips: Tensor, tokens: Tensor, fill: float) -> Tensor:
    """Clips with every pixel of the patches `tokens` set to `fill`."""
    all_patches = patches.patchify(clips)
    places = tokens.unsqueeze(-1).expand(-1, -1, all_patches.shape[-1])
    changed = all_patches.scatter(1, places, fill)
    return patches.unpatchify(changed, clips.shape[2], clips.shape[3])


@torch.no_grad()
def _leaks(model: MaskedAutoencoder, clips: Tensor, visible: Tensor, masked: Tensor) -> bool:
    """Whether masked pixels change any stage of the encoder by a single bit."""
    hidden = _replace_patches(clips, masked, float("nan"))
    before, after = model.encoder(clips, visible), model.encoder(hidden, visible)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _without_gradient(model: MaskedAutoencoder, batch: Batch) -> list[str]:
    """Names of the parameters that a training step leaves without a gradient."""
    clips, visible, masked = batch
    prediction = model(clips, visible, masked)
    loss.masked_patch_loss(prediction, loss.targets(clips, masked)).backward()
    return [name for name, parameter in model.named_parameters() if parameter.grad is None]


def _plant_dense_context(model: MaskedAutoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released defect: a reverse block's context is the embedding of all patches."""
    encoder = model.encoder
    embed, everything = encoder.patch_embed.forward, []

    def embed_and_remember(clips: Tensor, tokens: Tensor | None = None) -> Tensor:
        everything[:] = [embed(clips)]
        return embed(clips, tokens)

    monkeypatch.setattr(encoder.patch_embed, "forward", embed_and_remember)
    for last in list(itertools.accumulate(encoder.stage_depths))[1:]:
        reverse = encoder.blocks[last - 1]
        monkeypatch.setattr(
            reverse, "forward", lambda x, _, run=reverse.forward: run(x, everything[0])
        )


def test_masked_pixels_never_reach_the_encoder(model: MaskedAutoencoder, batch: Batch) -> None:
    assert not _leaks(model, *batch)


def test_visible_pixels_do_reach_every_stage(model: MaskedAutoencoder, batch: Batch) -> None:
    clips, visible, _ = batch
    changed = _replace_patches(clips, visible[:, :1], 0.0)
    for before, after in zip(
        model.encoder(clips, visible), model.encoder(changed, visible), strict=True
    ):
        assert not torch.equal(before, after)


def test_the_leak_guard_sees_the_planted_leak(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant_dense_context(model, monkeypatch)
    assert _leaks(model, *batch)


def test_every_parameter_gets_a_gradient(model: MaskedAutoencoder, batch: Batch) -> None:
    assert _without_gradient(model, batch) == []
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().max() < 1e-7
    ]
    # A constant added to all logits of a softmax changes nothing, so its gradient is zero.
    assert all("spatial_downsamples" in name and "fc2.bias" in name for name in silent)


def test_the_gradient_guard_sees_the_planted_defect(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant_dense_context(model, monkeypatch)
    starved = _without_gradient(model, batch)
    assert any("spatial_downsamples" in name for name in starved)
    assert any("cross_attn" in name for name in starved)


@settings(max_examples=30, deadline=None)
@given(
    tubelet_size=st.integers(1, 3),
    patch_size=st.integers(1, 5),
    num_tubelets=st.integers(1, 3),
    side=st.integers(1, 4),
)
def test_patches_can_be_put_back_together(
    tubelet_size: int, patch_size: int, num_tubelets: int, side: int
) -> None:
    frames, pixels = num_tubelets * tubelet_size, side * patch_size
    clips = torch.randn(2, 3, frames, pixels, pixels)
    patched = patches.patchify(clips, tubelet_size, patch_size)
    assert patched.shape == (2, num_tubelets * side**2, tubelet_size * patch_size**2 * 3)
    back = patches.unpatchify(patched, frames, pixels, tubelet_size, patch_size)
    assert torch.equal(back, clips)


def test_the_round_trip_guard_sees_another_layout() -> None:
    clips = torch.randn(1, 3, 4, 32, 32)
    channel_first = patches.gather_patches(clips, torch.arange(8).unsqueeze(0)).flatten(2)
    assert channel_first.shape == patches.patchify(clips).shape
    assert not torch.equal(patches.unpatchify(channel_first, 4, 32), clips)


def test_the_model_learns_a_batch_by_heart(tubes: Callable[..., tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model: nn.Module = autoencoder.build("nano", frame_size=32, num_frames=8)
    clips = torch.randn(2, 3, 8, 32, 32)
    visible, masked = tubes(autoencoder.resolve("nano", {"frame_size": 32, "num_frames": 8}), 2, 1)
    target = loss.targets(clips, masked)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        error = loss.masked_patch_loss(model(clips, visible, masked), target)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < 0.7 * losses[0]
