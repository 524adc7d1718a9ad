"""Convert a network to an ONNX graph, and compare the two before it is written.

In: a `Network`. Out: the bytes of a model.onnx with the input `clips` [batch, 3, F, S, S], float32
and normalized, and the outputs `features` [batch, D] and, of a fine-tuned network, `scores` [batch,
outputs]; the batch size is free. onnxruntime runs it on random clips at two batch sizes beside
torch, and a graph that differs is refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from svfap_dist.errors import CheckpointError
from svfap_dist.inference.load import Network

TOLERANCE = 1e-4  # largest difference of an output
_TRACED, _CHECKED = 2, (1, 3)  # batch sizes; 2, for torch takes 1 to be fixed


class _Outputs(nn.Module):
    """All outputs of a network: clips -> (features,) or (features, scores)."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        features = self.network.features(clips)
        if self.network.head is None:
            return (features,)
        return features, self.network.activation(self.network.head(features))


def to_onnx(network: Network) -> tuple[bytes, float]:
    """Return a network's ONNX model, and the largest difference between its outputs and torch's.

    Args:
        network: any network that `load` returns.

    Raises:
        CheckpointError: see `check`.
    """
    import onnxruntime  # noqa: F401 - missing packages are an error before the export, not after
    import onnxscript  # noqa: F401 - torch.onnx needs it

    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _Outputs(network).eval(),
            (_clips(network, _TRACED),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["clips"],
            output_names=["features"] if network.head is None else ["features", "scores"],
        )
    assert program is not None, "dynamo=True gives a program"
    data = program.model_proto.SerializeToString()
    return data, check(data, network)


def check(data: bytes, network: Network) -> float:
    """Return the largest difference between the outputs of an ONNX model and of its network.

    Args:
        data: the ONNX model.
        network: the network.

    Raises:
        CheckpointError: it is more than TOLERANCE.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    model = _Outputs(network).eval()
    difference = max(_difference(model, session, _clips(network, count)) for count in _CHECKED)
    if not difference <= TOLERANCE:  # refuses NaN, too
        raise CheckpointError(
            "ONNX model computes something else than the network",
            where="onnxruntime",
            found=f"outputs that differ by {difference:.2g}, more than {TOLERANCE:g}",
            do="export it as safetensors",
        )
    return difference


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's exporter, which warns about torchvision's operators and deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _clips(network: Network, count: int) -> Tensor:
    info = network.info
    size = (count, 3, info.num_frames, info.frame_size, info.frame_size)
    return torch.randn(size, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def _difference(model: nn.Module, session: Any, clips: Tensor) -> float:
    found = session.run(None, {"clips": clips.numpy()})
    pairs = zip(model(clips), found, strict=True)
    return max(float(np.abs(ours.numpy() - theirs).max()) for ours, theirs in pairs)
