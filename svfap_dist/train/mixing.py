"""Mixup and CutMix: two clips of a batch become one, and so do their targets.

In: a rank's clips and their targets. Out: both, mixed. Clip i is mixed with clip B-1-i, with one
share for the whole batch: all pixels are averaged (mixup), or a box is copied from the other clip
(CutMix), the same box in all frames. Either way the targets are averaged, in CutMix by the area of
the box inside the frame. Where the device augments (augment.run_on), each clip has a share of its
own, drawn from its own stream, so that the number of ranks and the rest of the batch change only
which clip it is mixed with.

These are the modes "batch" and "elem" of timm's `Mixup`. VideoMAE's fine-tuning uses "batch", with
one difference: VideoMAE's copy cuts the box out of dimensions 2 and 3 of clips [B, 3, F, H, W],
frames and rows, so most batches keep all their pixels while their targets are mixed. Here the box
is in rows and columns, as in the papers and in timm.

Sources: mixup, arXiv 1710.09412; CutMix, arXiv 1905.04899; timm data/mixup.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svfap_dist.config import FinetuneConfig
from svfap_dist.rng import Stream
from svfap_dist.video.info import Crop


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return smoothed one-hot targets, float32 [B, C].

    Args:
        labels: Class indices, int64 [B].
        num_classes: Number of classes, C.
        smoothing: Share of each target that is spread over all classes.
    """
    one_hot = torch.nn.functional.one_hot(labels, num_classes).float()
    return one_hot * (1 - smoothing) + smoothing / num_classes


def mix(
    clips: Tensor, targets: Tensor, stream: Stream, finetune: FinetuneConfig
) -> tuple[Tensor, Tensor]:
    """Return the clips and targets of a batch, mixed; unchanged ones are not copied.

    Args:
        clips: Frames uint8 [B, F, H, W, 3], or normalized floats [B, 3, F, H, W].
        targets: Class scores, float [B, C].
        stream: Random numbers of the step and rank.
        finetune: Alphas and probabilities.
    """
    share, by_box = _draw(stream, finetune)
    if share == 1:
        return clips, targets
    if by_box:
        rows, columns = (2, 3) if clips.dtype is torch.uint8 else (3, 4)
        height, width = clips.shape[rows], clips.shape[columns]
        box = cut_box(stream, share, height, width)
        share = 1 - box.height * box.width / (height * width)
        clips = _pasted(clips, box, rows, columns)
    else:
        clips = _averaged(clips, share)
    return clips, share * targets + (1 - share) * targets.flip(0)


def mix_each(
    clips: Tensor, targets: Tensor, streams: Sequence[Stream], finetune: FinetuneConfig
) -> tuple[Tensor, Tensor]:
    """Return the clips and targets of a batch, each mixed with a share of its own.

    The result is a copy unless mixing is off.

    Args:
        clips: Normalized floats [B, 3, F, H, W].
        targets: Class scores, float [B, C].
        streams: Random numbers of each clip.
        finetune: Alphas and probabilities.
    """
    if not (finetune.mixup or finetune.cutmix):
        return clips, targets
    mixed, shares = clips.clone(), []
    for own, other, out, stream in zip(clips, clips.flip(0), mixed, streams, strict=True):
        share, by_box = _draw(stream, finetune)
        if by_box and share < 1:
            height, width = own.shape[2:]
            box = cut_box(stream, share, height, width)
            share = 1 - box.height * box.width / (height * width)
            rows = slice(box.top, box.top + box.height)
            columns = slice(box.left, box.left + box.width)
            out[..., rows, columns] = other[..., rows, columns]
        elif share < 1:
            torch.lerp(other, own, share, out=out)
        shares.append(share)
    on_host = torch.tensor(shares, pin_memory=clips.device.type == "cuda")
    own_share = on_host.to(clips.device, non_blocking=True).unsqueeze(1)
    return mixed, own_share * targets + (1 - own_share) * targets.flip(0)


def _draw(stream: Stream, finetune: FinetuneConfig) -> tuple[float, bool]:
    """Return the share of itself that a clip keeps, and whether the rest is a box."""
    mixup, cutmix = finetune.mixup, finetune.cutmix
    if not (mixup or cutmix) or stream.uniform() >= finetune.mix_probability:
        return 1.0, False
    by_box = stream.uniform() < finetune.cutmix_probability if mixup and cutmix else cutmix > 0
    alpha = cutmix if by_box else mixup
    return stream.beta(alpha, alpha), by_box


def cut_box(stream: Stream, share: float, height: int, width: int) -> Crop:
    """Return a box of area 1 - share around a random pixel, clipped to the frame.

    Args:
        stream: Random numbers.
        share: Share of the frame's area outside the box.
        height: Height of the frame in pixels.
        width: Width of the frame in pixels.
    """
    top, bottom = _span(stream, share, height)
    left, right = _span(stream, share, width)
    return Crop(top, left, bottom - top, right - left)


def _span(stream: Stream, share: float, length: int) -> tuple[int, int]:
    half, middle = int(length * math.sqrt(1 - share)) // 2, stream.integer(length)
    return max(middle - half, 0), min(middle + half, length)


def _pasted(clips: Tensor, box: Crop, rows: int, columns: int) -> Tensor:
    """Return the clips with the box of their partners."""
    mixed = clips.clone()
    place = mixed.narrow(rows, box.top, box.height).narrow(columns, box.left, box.width)
    partners = clips.narrow(rows, box.top, box.height).narrow(columns, box.left, box.width)
    place.copy_(partners.flip(0))
    return mixed


def _averaged(clips: Tensor, share: float) -> Tensor:
    """Return the clips averaged with their partners; bytes are rounded."""
    if clips.dtype is torch.uint8:
        return torch.lerp(clips.flip(0).float(), clips.float(), share).round().to(torch.uint8)
    return torch.lerp(clips.flip(0), clips, share)
