"""The guards that must hold for every network before any training, as functions that tests call.

Masked pixels never reach the encoder; every parameter gets a gradient; tokens keep their place.
Each takes a model and a batch (clips, visible, masked) and returns what is wrong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from svfap_dist.model import patches
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.layers import Block, CrossBlock

Batch = tuple[Tensor, Tensor, Tensor]


def replace_patches(model: MaskedAutoencoder, clips: Tensor, tokens: Tensor, fill: float) -> Tensor:
    """Clips with every pixel of the patches `tokens` set to `fill`."""
    size = model.size
    all_patches = patches.patchify(clips, size.patch)
    places = tokens.unsqueeze(-1).expand(-1, -1, all_patches.shape[-1])
    return patches.unpatchify(
        all_patches.scatter(1, places, fill),
        size.num_frames,
        size.frame_size,
        size.patch,
    )


def unseen(model: MaskedAutoencoder, visible: Tensor) -> Tensor:
    """All tokens that are not visible, sorted: what is masked, whether it is predicted or not."""
    everything = torch.ones(len(visible), model.size.num_tokens, dtype=torch.bool)
    rows, tokens = everything.scatter(1, visible, False).nonzero(as_tuple=True)
    assert len(rows) == len(visible) * (model.size.num_tokens - visible.shape[1])
    return tokens.unflatten(0, (len(visible), -1))


@torch.no_grad()
def leaks(model: MaskedAutoencoder, batch: Batch) -> bool:
    """Whether masked pixels change any stage of the encoder by a single bit."""
    clips, visible, _ = batch
    hidden = replace_patches(model, clips, unseen(model, visible), float("nan"))
    before, after = model.encoder(clips, visible), model.encoder(hidden, visible)
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def without_gradient(model: MaskedAutoencoder, batch: Batch) -> list[str]:
    """Names of the parameters that a training step leaves without a gradient."""
    clips, visible, masked = batch
    size = model.size
    target = patches.targets(clips, masked, size.patch)
    patches.masked_patch_loss(model(clips, visible, masked), target).backward()
    # A constant added to all logits of a softmax changes nothing, so its gradient is zero.
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None
        or (
            parameter.grad.abs().max() < 1e-9
            and not ("spatial_downsamples" in name and name.endswith("fc2.bias"))
        )
    ]


@torch.no_grad()
def misplaced(model: MaskedAutoencoder, batch: Batch) -> set[int]:
    """Numbers of the fused tokens that one visible patch changes although they are elsewhere.

    With all blocks silenced nothing mixes the tokens but the pyramid, so a patch must show in its
    own position only, and there in the tubelet frames that are merged with its own.
    """
    clips, visible, _ = batch
    size = model.size
    for module in model.encoder.modules():
        if isinstance(module, (Block, CrossBlock)):
            _silence(module)
    frames = size.num_visible_tubelets or size.num_tubelets
    positions = visible.shape[1] // frames
    merged = math.prod(size.merge_factors)
    frame, position = frames - 1 - merged // 2, positions - 1
    changed = frame * positions + position
    moved = replace_patches(model, clips, visible[:, changed : changed + 1], 9.0)
    before, after = (model.fusion(model.encoder(x, visible)) for x in (clips, moved))
    differ = (before != after).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    group = range(frame // merged * merged, (frame // merged + 1) * merged)
    own = {f * positions + position for f in group}
    assert changed in differ
    return set(differ) - own


def _silence(block: nn.Module) -> None:
    for name, parameter in block.named_parameters():
        if ".proj." in name or "fc2" in name:
            parameter.zero_()
