"""Shortcuts through the layers: each gives what the long way gives."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from svfap_dist.model import autoencoder, layers, patches
from svfap_dist.model.autoencoder import MaskedAutoencoder

Tubes = Callable[..., tuple[Tensor, Tensor]]


@pytest.mark.parametrize("first", [0, 1, 6])
def test_a_block_asked_for_some_tokens_gives_those_of_all(first: int) -> None:
    torch.manual_seed(0)
    block = layers.Block(32, 4)
    for bias in (block.attn.q_bias, block.attn.v_bias):
        nn.init.normal_(bias)
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(block(x, first), block(x)[:, first:], atol=1e-6, rtol=1e-6)


def test_the_decoder_gives_what_its_whole_last_block_gives(tubes: Tubes) -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", frame_size=64, decoder_depth=2)
    visible, masked = tubes(model.size, 2, 3)
    decoder, tokens = model.decoder, torch.randn(2, visible.shape[1], 32)
    x = torch.cat(
        (
            decoder.embed(tokens) + decoder.table[visible],
            decoder.mask_token + decoder.table[masked],
        ),
        dim=1,
    )
    for block in decoder.blocks:
        x = block(x)
    expected = decoder.head(decoder.norm(x[:, visible.shape[1] :]))
    torch.testing.assert_close(decoder(tokens, visible, masked), expected, atol=1e-6, rtol=1e-6)


def _step(model: MaskedAutoencoder, frames: Tensor, split: tuple[Tensor, Tensor]) -> Tensor:
    visible, masked = split
    value = patches.masked_patch_loss(
        model(frames, visible, masked), patches.targets(frames, masked)
    )
    value.backward()
    return value


def _bytes_kept(model: MaskedAutoencoder, frames: Tensor, split: tuple[Tensor, Tensor]) -> int:
    """Bytes of different memory that a forward pass keeps for the backward pass."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output = model(frames, *split)
    assert output.requires_grad
    return sum(kept.values())


def test_recomputing_blocks_gives_the_same_gradients_and_keeps_less(tubes: Tubes) -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", frame_size=64)
    frugal = copy.deepcopy(model)
    layers.enable_activation_checkpointing(frugal)
    frames = torch.randint(0, 256, (2, 16, 64, 64, 3), dtype=torch.uint8)
    split = tubes(model.size, 2, 4)
    assert torch.equal(_step(frugal, frames, split), _step(model, frames, split))
    gradients = dict(model.named_parameters())
    for name, parameter in frugal.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
    assert _bytes_kept(frugal, frames, split) < 0.5 * _bytes_kept(model, frames, split)
