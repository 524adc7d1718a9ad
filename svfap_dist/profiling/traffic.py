"""Count the bytes that the conversion kernel reads and writes, from shapes.

What torch's own operations read and write is counted while they run, by `operations`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svfap_dist.video.frames import YuvClips, resampling_weights

_TABLE_BYTES = 12 * 4  # of one kind of planes in `color_table`


def kernel_bytes(
    clips: YuvClips, visible: Tensor, masked: Tensor, patch: tuple[int, int], dtype: torch.dtype
) -> int:
    """Return the bytes that `plane_kernel.patches_and_targets` reads and writes.

    Each program counts every byte that it reads once, also where its neighbors read it, too.

    Args:
        clips: planes; only shapes and crops count.
        visible: indices of the visible tokens, [B, V].
        masked: indices of the masked tokens, [B, M].
        patch: frames and pixels of a patch.
        dtype: of the results.
    """
    tubelet_size, patch_size = patch
    side = clips.size // patch_size
    tokens = torch.cat((visible, masked), dim=1)
    row = tokens.div(side, rounding_mode="floor").remainder(side)
    column = tokens.remainder(side)
    crops, samples = clips.crops.float(), 0
    for plane, scale, count in ((clips.y, 1, 1), (clips.u, 2, 2)):  # v has the same bytes as u
        top, left, height, width = (crops / scale).unbind(1)
        rows = _samples_per_patch(top, height, plane.shape[2], clips.size, patch_size)
        columns = _samples_per_patch(left, width, plane.shape[3], clips.size, patch_size)
        used = rows.gather(1, row) * columns.gather(1, column)  # of a frame, [B, V + M]
        samples += count * tubelet_size * int(used.sum())
    per_token = visible.itemsize + 4 * clips.crops.itemsize + clips.kinds.itemsize + _TABLE_BYTES
    per_token += tubelet_size * patch_size**2 * 3 * dtype.itemsize
    return samples + tokens.numel() * per_token


def _samples_per_patch(
    start: Tensor, length: Tensor, size: int, out: int, patch_size: int
) -> Tensor:
    """Return how many samples of a side the pixels of each patch are made of, [B, out / p]."""
    used = resampling_weights(start, length, size, out) > 0  # [B, out, size]
    return used.unflatten(1, (-1, patch_size)).any(dim=2).sum(dim=2)
