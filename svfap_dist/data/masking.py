"""Which tokens the encoder sees: two sorted index lists per clip.

Token t * S + s is patch s of tubelet frame t. Masks are index lists and never boolean arrays, so
there is no polarity to remember and the encoder can gather what it needs.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from svfap_dist.rng import Stream


@dataclasses.dataclass(frozen=True)
class TokenSplit:
    """The tokens of a clip in two parts, each sorted, int64."""

    visible: np.ndarray  # [V]
    masked: np.ndarray  # [M]


def tube(stream: Stream, num_tubelets: int, num_patches: int, ratio: float) -> TokenSplit:
    """Mask the same round(S * ratio) patches in every tubelet frame (paper, section III-B).

    Args:
        stream: the clip's random numbers.
        num_tubelets: T, tubelet frames of the clip.
        num_patches: S, patches of a tubelet frame.
        ratio: share of patches to mask.
    """
    patches = stream.permutation(num_patches)
    num_masked = round(num_patches * ratio)
    frames = np.arange(num_tubelets)[:, None] * num_patches  # [T, 1]
    return TokenSplit(
        visible=(frames + np.sort(patches[num_masked:])).reshape(-1),
        masked=(frames + np.sort(patches[:num_masked])).reshape(-1),
    )
