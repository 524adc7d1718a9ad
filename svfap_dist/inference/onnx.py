"""Convert a network to an ONNX graph, and compare the two before it is written.

In: a `Network`. Out: the bytes of a model.onnx, whose inputs and outputs `graph_outputs` describes.
onnxruntime runs it on random clips at two batch sizes beside torch, and a graph that differs is
refused.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch

from svfap_dist.inference.graph_outputs import (
    TRACED_BATCH,
    AllOutputs,
    compare,
    output_names,
    random_clips,
)
from svfap_dist.inference.load import Network
from svfap_dist.model.weights import ModelInfo

OPSET = 20  # TensorRT 10 and onnxruntime 1.17 read it
_ENGINE_BATCHES = (1, 8, 32)  # smallest, best and largest batch of a TensorRT engine


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
            AllOutputs(network).eval(),
            (random_clips(network, TRACED_BATCH),),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=["clips"],
            output_names=output_names(network),
            opset_version=OPSET,
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
        CheckpointError: it is more than `graph_outputs.TOLERANCE`.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return compare(network, lambda clips: session.run(None, {"clips": clips.numpy()}), "ONNX")


def tensorrt_command(info: ModelInfo, onnx_file: str) -> str:
    """Return the command that builds a TensorRT engine from an exported model.

    Args:
        info: of the network.
        onnx_file: name of the model.
    """
    clip = f"3x{info.num_frames}x{info.frame_size}x{info.frame_size}"
    shapes = " ".join(
        f"--{name}Shapes=clips:{batch}x{clip}"
        for name, batch in zip(("min", "opt", "max"), _ENGINE_BATCHES, strict=True)
    )
    return f"trtexec --onnx={onnx_file} {shapes} --saveEngine=model.plan"


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
