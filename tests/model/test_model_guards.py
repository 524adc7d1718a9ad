"""The guards that must hold before any training, and proof that each of them can fail.

Masked pixels never reach the encoder; every parameter gets a gradient; tokens keep their place;
patches can be put back together. The planted defects are those found in the released pre-training
code, and a swapped polarity. Here for the method itself; test_model_ablations has the variants.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_guards import Batch, leaks, misplaced, replace_patches, unseen, without_gradient
from torch import Tensor, nn

from svfap_dist.model import autoencoder, patches
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.encoder import StageFusion, TemporalDownsample


@pytest.fixture
def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return autoencoder.build("nano", frame_size=64)


@pytest.fixture
def batch(model: MaskedAutoencoder, tubes: Callable[..., tuple[Tensor, Tensor]]) -> Batch:
    torch.manual_seed(1)
    return torch.randn(2, 3, 16, 64, 64), *tubes(model.size, clips=2, visible_per_frame=5)


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
    assert not leaks(model, batch)


def test_visible_pixels_do_reach_every_stage(model: MaskedAutoencoder, batch: Batch) -> None:
    clips, visible, _ = batch
    changed = replace_patches(model, clips, visible[:, :1], 0.0)
    for before, after in zip(
        model.encoder(clips, visible), model.encoder(changed, visible), strict=True
    ):
        assert not torch.equal(before, after)


def test_the_leak_guard_sees_the_planted_leak(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant_dense_context(model, monkeypatch)
    assert leaks(model, batch)


def test_the_leak_guard_sees_a_swapped_polarity(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A boolean mask read the wrong way round: the encoder is given the masked patches."""
    embed = model.encoder.patch_embed.forward
    monkeypatch.setattr(
        model.encoder.patch_embed, "forward", lambda clips, v: embed(clips, unseen(model, v))
    )
    assert leaks(model, batch)


def test_every_parameter_gets_a_gradient(model: MaskedAutoencoder, batch: Batch) -> None:
    assert without_gradient(model, batch) == []


def test_the_gradient_guard_sees_the_planted_defect(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    _plant_dense_context(model, monkeypatch)
    starved = without_gradient(model, batch)
    assert any("spatial_downsamples" in name for name in starved)
    assert any("cross_attn" in name for name in starved)


def test_tokens_keep_their_place(model: MaskedAutoencoder, batch: Batch) -> None:
    assert misplaced(model, batch) == set()


def test_the_order_guard_sees_tokens_repeated_as_one_run(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The released defect: coarse tokens regrouped with the time length from before the pooling."""

    def scrambled(fusion: StageFusion, stage: Tensor, positions: int) -> Tensor:
        repeats = fusion.num_tubelets * positions // stage.shape[1]
        return stage.repeat(1, repeats, 1).unflatten(1, (-1, positions))

    monkeypatch.setattr(StageFusion, "_at_finest", scrambled)
    assert misplaced(model, batch)


def test_the_order_guard_sees_distant_frames_merged(
    model: MaskedAutoencoder, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = TemporalDownsample.forward

    def scrambled(self: TemporalDownsample, x: Tensor) -> Tensor:
        regrouped = x.unflatten(1, (self.kernel_size[0], -1)).transpose(1, 2).flatten(1, 2)
        return merge(self, regrouped)  # frames 0 and t/2 together instead of 0 and 1

    monkeypatch.setattr(TemporalDownsample, "forward", scrambled)
    assert misplaced(model, batch)


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
    patched = patches.patchify(clips, (tubelet_size, patch_size))
    assert patched.shape == (2, num_tubelets * side**2, tubelet_size * patch_size**2 * 3)
    back = patches.unpatchify(patched, frames, pixels, (tubelet_size, patch_size))
    assert torch.equal(back, clips)


def test_the_round_trip_guard_sees_another_layout() -> None:
    clips = torch.randn(1, 3, 4, 32, 32)
    channel_first = patches._gather_patches(clips, torch.arange(8).unsqueeze(0)).flatten(2)
    assert channel_first.shape == patches.patchify(clips).shape
    assert not torch.equal(patches.unpatchify(channel_first, 4, 32), clips)


def test_the_model_learns_a_batch_by_heart(tubes: Callable[..., tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    model: nn.Module = autoencoder.build("nano", frame_size=32, num_frames=8)
    clips = torch.randn(2, 3, 8, 32, 32)
    visible, masked = tubes(autoencoder.resolve("nano", {"frame_size": 32, "num_frames": 8}), 2, 1)
    target = patches.targets(clips, masked)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        error = patches.masked_patch_loss(model(clips, visible, masked), target)
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        losses.append(error.item())
    assert losses[-1] < 0.7 * losses[0]
