"""Clips to patches and tokens, and back: the first step of the model.

In: uint8 frames from the loader (or clips, which are frames normalised), and the sorted indices of
the tokens wanted. Out: pixels of those patches, or their embeddings. Token n = t*S + s is the patch
s (row by row) of tubelet frame t. The pixels of the wanted patches are gathered first, then
normalised, then embedded by one linear layer: with nine tenths masked that is a tenth of the work
of a convolution over the clip, and a masked pixel cannot reach the encoder, since it is never read.

Legend: B clips, F frames, T tubelet frames, S patches per tubelet frame (Sy rows, Sx columns),
N = T*S tokens, K tokens wanted, D width, pt frames and p pixels of a patch, P = pt*p*p*3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svfap_dist.errors import ConfigError
from svfap_dist.model.layers import linear

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
TUBELET_SIZE = 2  # frames; the paper's
PATCH_SIZE = 16  # pixels; the paper's


def normalize(frames: Tensor, channel_dim: int = 1) -> Tensor:
    """Frames uint8 [B, F, H, W, 3] as float32 clips [B, 3, F, H, W] with ImageNet statistics.

    The channels of the result are in `channel_dim`; those of the argument are last, whatever its
    other dimensions are.
    """
    # The statistics enter as plain numbers: a tensor of them would be a copy to the device.
    return torch.stack(
        [
            (frames[..., channel].float() / 255 - mean) / std
            for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
        ],
        dim=channel_dim,
    )


def denormalize(pixels: Tensor, channel_dim: int = 1) -> Tensor:
    """Normalised pixels as float32 in [0, 1], channels in `channel_dim`; undoes `normalize`."""
    return torch.stack(
        [
            plane.float() * std + mean
            for plane, mean, std in zip(
                pixels.unbind(channel_dim), IMAGENET_MEAN, IMAGENET_STD, strict=True
            )
        ],
        dim=channel_dim,
    )


def _grid(clips: Tensor, tubelet_size: int, patch_size: int) -> Tensor:
    """A view of clips [B, 3, F, H, W] as their patches [B, T, Sy, Sx, 3, pt, p, p]."""
    x = clips.unflatten(4, (-1, patch_size))
    x = x.unflatten(3, (-1, patch_size))
    x = x.unflatten(2, (-1, tubelet_size))  # [B, 3, T, pt, Sy, p, Sx, p]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def gather_patches(
    clips: Tensor,
    tokens: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Pixels of the patches `tokens` [B, K] of clips [B, 3, F, H, W]: [B, K, 3, pt, p, p]."""
    grid = _grid(clips, tubelet_size, patch_size)
    rows, columns = grid.shape[2:4]
    clip = torch.arange(len(clips), device=clips.device).unsqueeze(1)  # [B, 1]
    row = tokens.div(columns, rounding_mode="floor")  # counted through all tubelet frames
    return grid[
        clip, row.div(rows, rounding_mode="floor"), row.remainder(rows), tokens.remainder(columns)
    ]


def gather_rows(
    frames: Tensor,
    tokens: Tensor,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Pixels of the patches `tokens` [B, K] of frames [B, F, H, W, 3], row by row of each patch:
    [B, K, pt*p, p*3].

    A row of a patch lies together in memory, so rows, not numbers, are what is looked up and
    copied.
    """
    clips, num_frames, height, width, _ = frames.shape
    columns = width // patch_size
    tubelet = tokens.div(columns * (height // patch_size), rounding_mode="floor")
    patch_row = tokens.div(columns, rounding_mode="floor").remainder(height // patch_size)
    clip = torch.arange(clips, device=frames.device).unsqueeze(1)  # [B, 1]
    # Where the first row of each patch is among all rows of all patches, [B, K], and how far
    # behind it the others are, [pt*p].
    pixel_row = (clip * num_frames + tubelet * tubelet_size) * height + patch_row * patch_size
    first = pixel_row * columns + tokens.remainder(columns)
    frame, row = (torch.arange(n, device=frames.device) for n in (tubelet_size, patch_size))
    behind = ((frame.unsqueeze(1) * height + row) * columns).flatten()
    rows = frames.reshape(-1, patch_size * 3)  # [B*F*H*Sx, p*3], a view
    index = (first.unsqueeze(-1) + behind).flatten()
    return rows.index_select(0, index).view(*tokens.shape, len(behind), -1)


def patchify(
    clips: Tensor, tubelet_size: int = TUBELET_SIZE, patch_size: int = PATCH_SIZE
) -> Tensor:
    """Clips [B, 3, F, H, W] as the patches [B, N, P] of all tokens, P laid out (pt, p, p, 3)."""
    grid = _grid(clips, tubelet_size, patch_size)
    return grid.flatten(1, 3).movedim(2, -1).flatten(2)


def unpatchify(
    patches: Tensor,
    num_frames: int,
    frame_size: int,
    tubelet_size: int = TUBELET_SIZE,
    patch_size: int = PATCH_SIZE,
) -> Tensor:
    """Patches [B, N, P] as clips [B, 3, F, H, W]; inverse of `patchify`."""
    side = frame_size // patch_size
    shape = (num_frames // tubelet_size, side, side, tubelet_size, patch_size, patch_size, 3)
    x = patches.reshape(len(patches), *shape)  # [B, T, Sy, Sx, pt, p, p, 3]
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, 3, T, pt, Sy, p, Sx, p]
    return x.reshape(len(patches), 3, num_frames, frame_size, frame_size)


def sine_cosine_table(length: int, dim: int) -> Tensor:
    """Fixed positions [length, dim]: sines in even columns, cosines in odd ones, base 10000.

    Source: Vaswani et al. 2017, section 3.5; one dimension, over the token index.
    """
    position = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position * frequency  # [length, dim/2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


class PatchProjection(nn.Conv3d):
    """A linear layer over gathered pixels [B, K, 3, pt, p, p] -> [B, K, D]; their last dimensions
    may be flattened.

    A convolution whose kernel equals its stride is this layer; weights keep the convolution's shape
    [D, 3, pt, p, p], in which released weights come.
    """

    def forward(self, input: Tensor) -> Tensor:
        # Under bfloat16 the weights, not the clips, say in which type the model computes.
        pixels = input.flatten(2).to(self.weight.dtype)
        return linear(pixels, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Embeds the wanted patches of clips and adds their positions."""

    table: Tensor

    def __init__(
        self, num_frames: int, frame_size: int, tubelet_size: int, patch_size: int, dim: int
    ) -> None:
        super().__init__()
        self.clip_shape = (3, num_frames, frame_size, frame_size)
        self.patch = (tubelet_size, patch_size)
        kernel = (tubelet_size, patch_size, patch_size)
        self.proj = PatchProjection(3, dim, kernel_size=kernel, stride=kernel)
        num_tokens = num_frames // tubelet_size * (frame_size // patch_size) ** 2
        # Computed, so not a part of the state that is saved.
        self.register_buffer("table", sine_cosine_table(num_tokens, dim), persistent=False)

    def forward(self, clips: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Tokens [B, K, D] of clips [B, 3, F, H, W] at indices `tokens` [B, K]; None means all N.

        In the clips' place may be frames uint8 [B, F, H, W, 3], which are normalised here.

        Raises: ConfigError if the clips are not of the shape that the model was built for.
        """
        self._check(clips)
        if tokens is None:
            clips = normalize(clips) if clips.dtype == torch.uint8 else clips
            pixels, positions = _grid(clips, *self.patch).flatten(1, 3), self.table
        elif clips.dtype == torch.uint8:
            rows = gather_rows(clips, tokens, *self.patch)  # [B, K, pt*p, p*3]
            pixels, positions = normalize(rows.unflatten(-1, (-1, 3)), 2), self.table[tokens]
        else:
            pixels, positions = gather_patches(clips, tokens, *self.patch), self.table[tokens]
        x = self.proj(pixels)  # [B, K, 3, ...] -> [B, K, D]
        # DeepSpeed's bfloat16 casts parameters and leaves tables in float32.
        return x + positions.to(x.dtype)

    def _check(self, clips: Tensor) -> None:
        channels, num_frames, height, width = self.clip_shape
        is_uint8 = clips.dtype == torch.uint8
        wanted = (num_frames, height, width, channels) if is_uint8 else self.clip_shape
        if clips.shape[1:] != wanted:
            kind = "frames uint8" if is_uint8 else "clips"
            raise ConfigError(
                "Clips do not fit the model",
                where="clips",
                found=f"{kind} of shape {tuple(clips.shape)}",
                do=f"give {kind} of shape [B, {', '.join(map(str, wanted))}]",
            )
