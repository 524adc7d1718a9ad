"""Patches and targets of pre-training, from the frames of a batch.

In: planes (or RGB frames) and the indices of the visible and the masked tokens. Out: what the
network and its loss need: normalized patches of the visible tokens, standardized ones of the
masked. On a GPU with Triton one kernel makes both from the planes (`plane_kernel`); elsewhere the
planes are converted to RGB first, whose patches are gathered.

Legend: B clips, V visible and M masked tokens, P values of a patch.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil

import torch
from torch import Tensor

from svfap_dist.model import patches
from svfap_dist.video.frames import YuvClips

log = logging.getLogger(__name__)


def patches_and_targets(
    frames: Tensor | YuvClips,
    visible: Tensor,
    masked: Tensor,
    patch: tuple[int, int],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the visible patches [B, V, P] and the targets [B, M, P] of clips.

    Args:
        frames: uint8 [B, F, H, W, 3], or planes, on the device of the indices.
        visible: indices of the tokens that the encoder sees, [B, V].
        masked: indices of the tokens that the decoder predicts, [B, M].
        patch: frames and pixels of a patch.
        dtype: of the patches, and of the targets that the kernel makes. Those of torch's operations
            stay in float32, because rounding them would be a pass over memory more, not less.
    """
    if isinstance(frames, YuvClips):
        if frames.y.is_cuda and _has_triton():
            from svfap_dist.model import plane_kernel

            return plane_kernel.patches_and_targets(frames, visible, masked, patch, dtype)
        frames = frames.to_rgb(frames.y.device)
    seen = patches.visible_patches(frames, visible, patch)
    return seen.to(dtype), patches.targets(frames, masked, patch)


@functools.cache
def _has_triton() -> bool:
    """Return whether Triton can build kernels, for which it needs a C compiler."""
    missing = "Triton is not installed" if importlib.util.find_spec("triton") is None else ""
    if not (missing or os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        missing = "Triton finds no C compiler (CC, gcc or clang)"
    if missing:
        log.warning("Planes are converted by many small operations: %s.", missing)
    return not missing
