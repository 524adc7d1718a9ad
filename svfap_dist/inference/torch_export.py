"""Convert a network to a torch.export program, and compare the two before it is written.

In: a `Network`. Out: the bytes of a model.pt2, whose inputs and outputs `graph_outputs` describes.
`torch.export.load` reads it without this package; AOTInductor compiles it.
"""

from __future__ import annotations

import io

import torch

from svfap_dist.inference.graph_outputs import (
    TRACED_BATCH,
    AllOutputs,
    compare,
    random_clips,
)
from svfap_dist.inference.load import Network


def to_torch_export(network: Network) -> tuple[bytes, float]:
    """Return a network's exported program, and how far its outputs are from the network's.

    Args:
        network: any network that `load` returns.

    Raises:
        CheckpointError: It computes something else.
    """
    clips = random_clips(network, TRACED_BATCH)
    with torch.no_grad():
        program = torch.export.export(
            AllOutputs(network).eval(),
            (clips,),
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    read = torch.export.load(io.BytesIO(file.getvalue())).module()
    run = lambda clips: [output.numpy() for output in read(clips)]  # noqa: E731
    return file.getvalue(), compare(network, run, "torch.export")
