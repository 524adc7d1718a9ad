"""Count the bytes of a model by running it: weights, and what the backward pass keeps of a clip.

In: how a model is built, and its loss on one clip. The model runs here, on the CPU, in the recipe's
type, and torch reports every tensor that it saves for the backward pass. What a rank needs follows
from that in `plan.limits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from svfap_dist.config import TrainConfig
from svfap_dist.model import layers

FLOAT_BYTES = 4  # of the optimizer's numbers
ADAM_MOMENTS = 2  # numbers of AdamW per weight


@dataclasses.dataclass(frozen=True)
class ModelBytes:
    """Counts of a model."""

    parameters: int  # weights
    number_bytes: int  # of one weight or gradient in the computing type
    buffers: int  # bytes of its tables
    kept_per_clip: int  # bytes that the backward pass keeps of a clip


def count_model(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module], Tensor], train: TrainConfig
) -> ModelBytes:
    """Build a model and send one clip through it.

    Args:
        build: returns the model.
        loss: returns the model's loss on one clip.
        train: says the type and whether activations are recomputed.
    """
    with torch.random.fork_rng(devices=[]):
        model = build()
    dtype = getattr(torch, train.dtype)
    model = model.to(dtype)
    kept = _kept_bytes(model, loss)
    if train.activation_checkpointing:
        whole = kept
        layers.enable_activation_checkpointing(model)
        blocks = sum(isinstance(part, layers.CheckpointedBlock) for part in model.modules())
        # The inputs of all blocks, and the inside of the one that is being recomputed.
        kept = _kept_bytes(model, loss) + whole // blocks
    return ModelBytes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        number_bytes=dtype.itemsize,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        kept_per_clip=kept,
    )


def _kept_bytes(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Return bytes of the storages that the backward pass of a loss keeps, except weights."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # references, so that no address is used twice

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(model)
    return sum(storage.nbytes() for storage in kept.values())


def checkpoint_bytes(model: nn.Module, train: TrainConfig) -> int:
    """Return the bytes of a checkpoint, the files of all ranks together.

    They hold the optimizer's numbers and the weights twice: DeepSpeed's file and our own.

    Args:
        model: may be on the meta device.
        train: says the type and the ZeRO stage.
    """
    number_bytes = getattr(torch, train.dtype).itemsize
    optimizer = (ADAM_MOMENTS + (train.zero_stage > 0)) * FLOAT_BYTES
    return sum(p.numel() for p in model.parameters()) * (2 * number_bytes + optimizer)
