"""What an exported graph computes, and its comparison with the network, for any kind of graph.

In: a `Network`, and the function that runs its exported graph. A graph has the input `clips`
[batch, 3, F, S, S], float32 and normalized, and the outputs `features` [batch, D] and, of a
fine-tuned network, `scores` [batch, outputs]; the batch size is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svfap_dist.errors import CheckpointError
from svfap_dist.inference.load import Network

TOLERANCE = 1e-4  # largest difference of an output
TRACED_BATCH = 2  # torch takes a batch of 1 to be fixed
_CHECKED_BATCHES = (1, 3)


class AllOutputs(nn.Module):
    """All outputs of a network: clips -> (features,) or (features, scores).

    Args:
        network: any network that `load` returns.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs.

        Args:
            clips: float32 [B, 3, F, S, S], normalized.
        """
        features = self.network.features(clips)
        if self.network.head is None:
            return (features,)
        return features, self.network.activation(self.network.head(features))


def output_names(network: Network) -> list[str]:
    """Return the names of the outputs.

    Args:
        network: any network that `load` returns.
    """
    return ["features"] if network.head is None else ["features", "scores"]


def random_clips(network: Network, count: int) -> Tensor:
    """Return the same random clips for the same count, float32 [count, 3, F, S, S].

    Args:
        network: whose clips they could be.
        count: how many.
    """
    info = network.info
    size = (count, 3, info.num_frames, info.frame_size, info.frame_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def compare(network: Network, run: Callable[[Tensor], Sequence[Any]], kind: str) -> float:
    """Return the largest difference between a graph's outputs and its network's.

    Args:
        network: the network.
        run: returns the graph's outputs, arrays, of clips.
        kind: name of the graph's format, for the error.

    Raises:
        CheckpointError: It is more than TOLERANCE.
    """
    model = AllOutputs(network).eval()
    differences = [
        float(np.abs(ours.numpy() - theirs).max())
        for clips in (random_clips(network, count) for count in _CHECKED_BATCHES)
        for ours, theirs in zip(model(clips), run(clips), strict=True)
    ]
    difference = float(np.max(differences))  # NaN if one of them is
    if not difference <= TOLERANCE:  # refuses NaN, too
        raise CheckpointError(
            f"Exported {kind} model does not match the network",
            where=kind,
            found=f"outputs that differ by {difference:.2g}, more than {TOLERANCE:g}",
            do="export it as safetensors",
        )
    return difference
