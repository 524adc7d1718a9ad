"""Bytes that a rank needs, by ZeRO stage.

Weights, gradients and the optimizer's numbers follow from their count and from what DeepSpeed
shares out at each stage (tests compare with an engine at work). What the backward pass keeps of a
clip is counted: the recipe's own model is run over one clip, here, on the CPU, in the recipe's
type, and torch tells each tensor that it keeps. Batches prepared ahead are the loader's ring. On a
GPU the ring lies in the host's memory. Not counted: torch's own context (about a gigabyte on a
GPU), room lost between blocks, passing copies, DeepSpeed's and the reader's caches.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.ring import ring_length
from svfap_dist.data.shared_arrays import shapes
from svfap_dist.model import autoencoder, layers, loss
from svfap_dist.rng import Stream
from svfap_dist.train.engine import REDUCE_BUCKET
from svfap_dist.train.objective import build_arguments

_FLOAT = 4  # bytes of the optimizer's numbers
_MOMENTS = 2  # of AdamW, per weight


@dataclasses.dataclass(frozen=True)
class ModelBytes:
    """What is counted of a model. number_bytes: of one weight or gradient, while it computes.
    buffers: bytes of its tables. kept_per_clip: bytes that the backward pass keeps of a clip."""

    parameters: int
    number_bytes: int
    buffers: int
    kept_per_clip: int


@dataclasses.dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank. total: of the device; prefetch is the host's, where they are not one."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    prefetch: int
    total: int


def count(config: Config) -> ModelBytes:
    """Build the recipe's model and send one clip through it."""
    with torch.random.fork_rng(devices=[]):
        model = autoencoder.build(**build_arguments(config))
    dtype = getattr(torch, config.train.dtype)
    model = model.to(dtype)
    kept = _kept_bytes(config, model)
    if config.train.activation_checkpointing:
        whole = kept
        layers.enable_activation_checkpointing(model)
        blocks = sum(isinstance(part, layers.CheckpointedBlock) for part in model.modules())
        # What goes into each block, and the inside of the one that is computed again.
        kept = _kept_bytes(config, model) + whole // blocks
    return ModelBytes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        number_bytes=dtype.itemsize,
        buffers=sum(buffer.nbytes for buffer in model.buffers()),
        kept_per_clip=kept,
    )


def checkpoint_bytes(config: Config) -> int:
    """Bytes of a checkpoint, the files of all ranks together: the optimizer's numbers, and the
    weights twice, as DeepSpeed's and as our own file."""
    with torch.random.fork_rng(devices=[]):
        model = autoencoder.build(**build_arguments(config))
    number_bytes = getattr(torch, config.train.dtype).itemsize
    optimizer = (_MOMENTS + (config.train.zero_stage > 0)) * _FLOAT
    return sum(p.numel() for p in model.parameters()) * (2 * number_bytes + optimizer)


def _kept_bytes(config: Config, model: torch.nn.Module) -> int:
    """Bytes of the storages that the backward pass of one clip keeps, weights left out."""
    data, size = config.data, config.data.frame_size
    frames = torch.zeros(1, data.num_frames, size, size, 3, dtype=torch.uint8)
    split = masking.predicted_split(Stream("plan"), config)
    visible, masked = (torch.from_numpy(part)[None] for part in (split.visible, split.masked))
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        target = loss.targets(frames, masked, config.model.tubelet_size, config.model.patch_size)
        loss.masked_patch_loss(model(frames, visible, masked), target)
    return sum(storage.nbytes() for storage in kept.values())


def prefetch_bytes(config: Config, world_size: int, planes: tuple[int, int] | None = None) -> int:
    """Bytes of a rank's ring of batches; planes: height and width, where those are handed over."""
    clips = config.train.global_batch_size // world_size
    arrays = shapes(config, ring_length(config, clips, planes), clips, planes).values()
    return sum(math.prod(shape) * (8 if kind == "int64" else 1) for kind, shape in arrays)


def by_stage(
    model: ModelBytes, config: Config, world_size: int, clips: int, prefetch: int
) -> dict[int, RankBytes]:
    """Bytes of a rank with each ZeRO stage that the recipe's type can have.

    clips: of a micro batch.
    """
    stages = (0, 1, 2, 3) if config.train.dtype == "float32" else (1, 2, 3)
    activations = clips * model.kept_per_clip
    found = {}
    for stage in stages:
        weights, gradients, optimizer = _states(model, world_size, stage)
        device = weights + gradients + optimizer + activations
        total = device if config.cluster.use_gpu else device + prefetch
        found[stage] = RankBytes(weights, gradients, optimizer, activations, prefetch, total)
    return found


def _states(model: ModelBytes, world_size: int, stage: int) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer, as DeepSpeed 0.19 holds them.

    Stage 0 steps on the weights themselves; the others on a rank's share of float32 copies, in
    float32 runs, too. Stage 3 shares out the weights, but lets none go again below a thousand
    million of them, which all models here are. Stages 2 and 3 reduce gradients by the bucket.
    """
    numbers, weights = model.parameters, model.parameters * model.number_bytes
    share = -(-numbers // world_size)
    bucket = min(numbers, REDUCE_BUCKET) * model.number_bytes
    if stage == 0:
        return weights + model.buffers, weights, _MOMENTS * _FLOAT * numbers
    optimizer = (1 + _MOMENTS) * _FLOAT * share
    if stage == 1:
        return weights + model.buffers, weights, optimizer
    gradients = share * model.number_bytes + bucket
    if stage == 2:
        return weights + model.buffers, gradients, optimizer
    return share * model.number_bytes + weights + model.buffers, gradients, optimizer
