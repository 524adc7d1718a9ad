"""Patches: clips to tokens, targets and loss of pre-training, and predictions back to pictures.

In: uint8 frames from the loader (or clips, which are normalized frames), and sorted token indices.
Out: pixels of these patches, or their embeddings. Token n = t*S + s is patch s (in row-major order)
of tubelet frame t. Pixels of the selected patches are gathered first, then normalized, then
embedded by one linear layer: with 90 % masked that is a tenth of the work of a convolution over
the clip, and a masked pixel cannot reach the encoder, because it is never read.

The decoder predicts pixels that are standardized per patch and per channel, so that it must learn
texture and shape instead of brightness. Targets are computed from the clips: only the masked
patches are gathered and standardized, always in float32. Source: method section of the paper; the
constants are those of the released code.

Legend: B clips, F frames, T tubelet frames, S patches per tubelet frame (Sy rows, Sx columns),
N = T*S tokens, K selected and M masked tokens, D width, pt frames and p pixels of a patch, P values
of a patch, P = pt*p*p*3 in the order (pt, p, p) then channel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist.errors import ConfigError
from svfap_dist.model.layers import linear
from svfap_dist.model.sizes import Size

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PATCH = (2, 16)  # frames, and pixels of height and width; the paper's
EPSILON = 1e-6  # of standardization; released code


def normalize(frames: Tensor, channel_dim: int = 1) -> Tensor:
    """Return frames as float32 clips [B, 3, F, H, W], normalized with ImageNet statistics.

    Args:
        frames: uint8 [B, F, H, W, 3], or of any other dimensions before the channels.
        channel_dim: dimension of the channels in the result.
    """
    # Statistics as Python numbers: a tensor of them would be a copy to the device.
    return torch.stack(
        [
            (frames[..., channel].float() / 255 - mean) / std
            for channel, (mean, std) in enumerate(zip(IMAGENET_MEAN, IMAGENET_STD, strict=True))
        ],
        dim=channel_dim,
    )


def denormalize(pixels: Tensor, channel_dim: int = 1) -> Tensor:
    """Return normalized pixels as float32 in [0, 1]; inverse of `normalize`.

    Args:
        pixels: normalized, of any dimensions.
        channel_dim: dimension of the channels, also in the result.
    """
    return torch.stack(
        [
            plane.float() * std + mean
            for plane, mean, std in zip(
                pixels.unbind(channel_dim), IMAGENET_MEAN, IMAGENET_STD, strict=True
            )
        ],
        dim=channel_dim,
    )


def _grid(clips: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return a view of clips [B, 3, F, H, W] as patches [B, T, Sy, Sx, 3, pt, p, p]."""
    tubelet_size, patch_size = patch
    x = clips.unflatten(4, (-1, patch_size)).unflatten(3, (-1, patch_size))
    x = x.unflatten(2, (-1, tubelet_size))  # [B, 3, T, pt, Sy, p, Sx, p]
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7)


def _gather_patches(clips: Tensor, tokens: Tensor, patch: tuple[int, int] = PATCH) -> Tensor:
    """Return the pixels of patches [B, K] of clips [B, 3, F, H, W]: [B, K, 3, pt, p, p]."""
    grid = _grid(clips, patch)
    rows, columns = grid.shape[2:4]
    clip = torch.arange(len(clips), device=clips.device).unsqueeze(1)  # [B, 1]
    row = tokens.div(columns, rounding_mode="floor")  # over all tubelet frames
    return grid[
        clip, row.div(rows, rounding_mode="floor"), row.remainder(rows), tokens.remainder(columns)
    ]


def _gather_rows(frames: Tensor, tokens: Tensor, patch: tuple[int, int] = PATCH) -> Tensor:
    """Return the pixels of patches [B, K] of frames [B, F, H, W, 3], by row: [B, K, pt*p, p*3].

    A row of a patch is contiguous in memory, so whole rows are indexed and copied.
    """
    tubelet_size, patch_size = patch
    clips, num_frames, height, width, _ = frames.shape
    columns = width // patch_size
    tubelet = tokens.div(columns * (height // patch_size), rounding_mode="floor")
    patch_row = tokens.div(columns, rounding_mode="floor").remainder(height // patch_size)
    clip = torch.arange(clips, device=frames.device).unsqueeze(1)  # [B, 1]
    # Index of the first row of each patch among all rows of all patches, [B, K], and offsets of
    # the others from it, [pt*p].
    pixel_row = (clip * num_frames + tubelet * tubelet_size) * height + patch_row * patch_size
    first = pixel_row * columns + tokens.remainder(columns)
    frame, row = (torch.arange(n, device=frames.device) for n in (tubelet_size, patch_size))
    offsets = ((frame.unsqueeze(1) * height + row) * columns).flatten()
    rows = frames.reshape(-1, patch_size * 3)  # [B*F*H*Sx, p*3], a view
    index = (first.unsqueeze(-1) + offsets).flatten()
    return rows.index_select(0, index).view(*tokens.shape, len(offsets), -1)


def visible_patches(frames: Tensor, visible: Tensor, patch: tuple[int, int] = PATCH) -> Tensor:
    """Return the normalized pixels of some patches in float32, [B, K, P], channel by channel.

    That is the order of `PatchProjection`'s weights; targets have the channels last.

    Args:
        frames: uint8 [B, F, H, W, 3].
        visible: indices of the patches, [B, K].
        patch: frames and pixels of a patch.
    """
    rows = _gather_rows(frames, visible, patch)  # [B, K, pt*p, p*3]
    return normalize(rows.unflatten(-1, (-1, 3)), 2).flatten(2)


def patchify(clips: Tensor, patch: tuple[int, int] = PATCH) -> Tensor:
    """Return clips as the patches [B, N, P] of all tokens, with P in the order (pt, p, p, 3).

    Args:
        clips: [B, 3, F, H, W].
        patch: frames and pixels of a patch.
    """
    grid = _grid(clips, patch)
    return grid.flatten(1, 3).movedim(2, -1).flatten(2)


def unpatchify(
    patches: Tensor,
    num_frames: int,
    frame_size: int,
    patch: tuple[int, int] = PATCH,
) -> Tensor:
    """Return patches as clips [B, 3, F, H, W]; inverse of `patchify`.

    Args:
        patches: [B, N, P].
        num_frames: F.
        frame_size: H = W, pixels.
        patch: frames and pixels of a patch.
    """
    tubelet_size, patch_size = patch
    side = frame_size // patch_size
    shape = (num_frames // tubelet_size, side, side, tubelet_size, patch_size, patch_size, 3)
    x = patches.reshape(len(patches), *shape)  # [B, T, Sy, Sx, pt, p, p, 3]
    x = x.permute(0, 7, 1, 4, 2, 5, 3, 6)  # [B, 3, T, pt, Sy, p, Sx, p]
    return x.reshape(len(patches), 3, num_frames, frame_size, frame_size)


def sine_cosine_table(length: int, dim: int) -> Tensor:
    """Return fixed positions [length, dim]: sines in even columns, cosines in odd, base 10000.

    Source: Vaswani et al. 2017, section 3.5; one dimension, over the token index.

    Args:
        length: number of tokens.
        dim: width, even.
    """
    position = torch.arange(length, dtype=torch.float64).unsqueeze(1)
    frequency = 10000 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = position * frequency  # [length, dim/2]
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1).float()


class PatchProjection(nn.Conv3d):
    """A linear layer over gathered pixels: [B, K, 3, pt, p, p] -> [B, K, D].

    The last dimensions of the pixels may be flattened. A convolution whose kernel equals its stride
    is this layer; weights keep the convolution's shape [D, 3, pt, p, p], as released weights do.
    """

    def forward(self, input: Tensor) -> Tensor:
        """See `PatchProjection`."""
        # The weights determine the type that the model computes in: clips are never bfloat16.
        pixels = input.flatten(2).to(self.weight.dtype)
        return linear(pixels, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Embeds the selected patches of clips and adds their positions."""

    table: Tensor

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.clip_shape = (3, size.num_frames, size.frame_size, size.frame_size)
        self.patch = size.patch
        kernel = (size.tubelet_size, size.patch_size, size.patch_size)
        self.proj = PatchProjection(3, size.embed_dim, kernel_size=kernel, stride=kernel)
        table = sine_cosine_table(size.num_tokens, size.embed_dim)
        self.register_buffer("table", table, persistent=False)

    def forward(self, clips: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Return embeddings [B, K, D].

        Args:
            clips: normalized floats [B, 3, F, H, W], or frames uint8 [B, F, H, W, 3], which are
                normalized here, or the tokens' patches [B, K, P] from `visible_patches`.
            tokens: sorted indices of the patches, [B, K]; None: all N.

        Raises:
            ConfigError: the clips do not have the shape that the model was built for.
        """
        self._check(clips, tokens)
        if tokens is None:
            clips = normalize(clips) if clips.dtype == torch.uint8 else clips
            pixels, positions = _grid(clips, self.patch).flatten(1, 3), self.table
        else:
            pixels, positions = self._pixels(clips, tokens), self.table[tokens]
        x = self.proj(pixels)  # [B, K, 3, ...] -> [B, K, D]
        # DeepSpeed's bfloat16 casts parameters and leaves tables in float32.
        return x + positions.to(x.dtype)

    def _pixels(self, clips: Tensor, tokens: Tensor) -> Tensor:
        """Return normalized pixels of patches; the last dimensions may be flattened."""
        if clips.dim() == 3:
            return clips
        if clips.dtype == torch.uint8:
            return visible_patches(clips, tokens, self.patch)
        return _gather_patches(clips, tokens, self.patch)

    def _check(self, clips: Tensor, tokens: Tensor | None) -> None:
        channels, num_frames, height, width = self.clip_shape
        wanted, kind = self.clip_shape, "clips"
        if clips.dtype == torch.uint8:
            wanted, kind = (num_frames, height, width, channels), "frames uint8"
        elif tokens is not None and clips.dim() == 3:
            # Not from the weight's shape: ZeRO-3 leaves it empty until the layer runs.
            wanted, kind = (tokens.shape[1], channels * math.prod(self.proj.kernel_size)), "patches"
        if clips.shape[1:] != wanted:
            raise ConfigError(
                "Clips do not fit the model",
                where="clips",
                found=f"{kind} of shape {tuple(clips.shape)}",
                do=f"give {kind} of shape [B, {', '.join(map(str, wanted))}]",
            )


def _rows(clips: Tensor, masked: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the pixels of the masked patches, 0 to 255, as float32 [B, M, pt*p, p*3]."""
    if clips.dtype == torch.uint8:
        return _gather_rows(clips, masked, patch).float()
    pixels = _gather_patches(clips, masked, patch)  # [B, M, 3, pt, p, p]
    return 255 * denormalize(pixels.movedim(2, -1), -1).flatten(-2).flatten(2, 3)


def _over_patch(x: Tensor) -> Tensor:
    """Sum over the pixels of each channel: [B, M, pt*p, p*3] -> [B, M, 3].

    Rows are added first, because that reads memory in order.
    """
    return x.sum(2).unflatten(2, (-1, 3)).sum(2)


def _to_rows(x: Tensor, patch_size: int) -> Tensor:
    """Repeat a value per channel for each value of a row: [B, M, 3] -> [B, M, 1, p*3]."""
    return x.repeat(1, 1, patch_size).unsqueeze(2)


def _centered(
    clips: Tensor, masked: Tensor, patch: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return centered pixels of the masked patches, their mean and their standard deviation.

    Shapes: [B, M, pt*p, p*3], and twice [B, M, 1, p*3]. Units: 1/255, in which sums of uint8 are
    exact.
    """
    pixels, (tubelet_size, patch_size) = _rows(clips, masked, patch), patch
    number = tubelet_size * patch_size**2
    mean = _to_rows(_over_patch(pixels) / number, patch_size)
    centered = pixels.sub_(mean)
    variance = _over_patch(centered.square()) / (number - 1)  # unbiased
    return centered, mean, _to_rows(variance.sqrt() + 255 * EPSILON, patch_size)


def targets(clips: Tensor, masked: Tensor, patch: tuple[int, int] = PATCH) -> Tensor:
    """Return the standardized pixels to predict, [B, M, P].

    Args:
        clips: frames uint8 [B, F, H, W, 3], or normalized floats [B, 3, F, H, W].
        masked: indices of the patches, [B, M].
        patch: frames and pixels of a patch.
    """
    centered, _, deviation = _centered(clips, masked, patch)
    return centered.div_(deviation).flatten(2)


def masked_patch_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error over masked patches, a float32 scalar.

    Args:
        prediction: [B, M, P].
        target: [B, M, P]; it receives no gradient.
    """
    return _MeanSquaredError.apply(prediction, target)


class _MeanSquaredError(torch.autograd.Function):
    """`F.mse_loss` of float32 copies, with the same bits, without keeping the copies.

    A step's memory peaks here, where all activations are held. In bfloat16 the two copies are four
    times the bytes of a prediction; the backward pass subtracts again instead.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, target)
        return _error(prediction, target).square_().mean()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, None]:
        prediction, target = ctx.saved_tensors
        error = _error(prediction, target)
        gradient = error.mul_(2 / error.numel()).mul_(grad_outputs[0])
        return gradient.to(prediction.dtype), None


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the difference as a new float32 tensor, and make no other."""
    if prediction.dtype == torch.float32:
        return prediction - target
    return prediction.float().sub_(target)


def losses_of_clips(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each clip over its masked patches, float32 [B].

    Args:
        prediction: [B, M, P].
        target: [B, M, P].
    """
    error = (prediction.float() - target).flatten(1)  # not in bfloat16
    return torch.linalg.vector_norm(error, dim=1).square() / error.shape[1]


def to_pixels(
    prediction: Tensor,
    clips: Tensor,
    masked: Tensor,
    patch: tuple[int, int] = PATCH,
) -> Tensor:
    """Return predictions as pixels in [0, 1], [B, M, P]; for pictures only, never for a score.

    Each patch gets the mean and deviation of its original, which the network does not predict.

    Args:
        prediction: [B, M, P].
        clips: the originals, as in `targets`.
        masked: indices of the predicted patches, [B, M].
        patch: frames and pixels of a patch.
    """
    _, mean, deviation = _centered(clips, masked, patch)
    rows = prediction.float().unflatten(2, (patch[0] * patch[1], -1))  # [B, M, pt*p, p*3]
    return ((rows * deviation + mean) / 255).clamp(0, 1).flatten(2)


def paste(
    pixels: Tensor,
    clips: Tensor,
    masked: Tensor,
    patch: tuple[int, int] = PATCH,
) -> Tensor:
    """Return clips [B, 3, F, H, W] in [0, 1] whose masked patches are replaced.

    Args:
        pixels: what replaces them, [B, M, P], in [0, 1].
        clips: the originals, normalized floats [B, 3, F, H, W].
        masked: indices of the patches, [B, M].
        patch: frames and pixels of a patch.
    """
    patches = patchify(denormalize(clips), patch)
    places = masked.unsqueeze(-1).expand_as(pixels)
    patches = patches.scatter(1, places, pixels.to(patches.dtype))
    return unpatchify(patches, clips.shape[2], clips.shape[3], patch)
