"""The ring of batches: what a device copies, it gets, however soon the buffer is filled again."""

from __future__ import annotations

import pytest
import torch
from loaders import SIZES, config_of, loader_of

from svfap_dist.config import ClusterConfig, Config, recipe
from svfap_dist.data.batch import BatchRing, ClipBatch
from svfap_dist.data.filler import BatchSlots, FilledBatch
from svfap_dist.video.frames import YuvClips

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
CLIPS = 4
LONG = 100_000_000  # cycles of a GPU: longer than what the host does meanwhile


def ring_config(device: str) -> Config:
    tables = {
        "data": {"num_frames": 8, "frame_size": 32, "prefetch_bytes": 1, "num_lanes": CLIPS},
        "mask": {"ratio": 0.5},
        "train": {"global_batch_size": CLIPS, "micro_batch_size": CLIPS},
        "cluster": {"use_gpu": device == "cuda"},
    }
    return recipe.from_tables(tables, where="test")


def fill(ring: BatchRing, place: int, value: int) -> ClipBatch:
    """What a feeder does with a buffer, and the batch of it."""
    for tensor in ring.tensors.values():
        tensor[place] = value
    zeros = [0] * CLIPS
    slots = BatchSlots([""] * CLIPS, zeros, zeros, zeros, [False] * CLIPS).pack()
    return ring.batch(place, [FilledBatch(slots, b"", [], 0.0, 0.0, 0)], ready=1)


def tensors_of(batch: ClipBatch) -> list[torch.Tensor]:
    frames = batch.frames
    planes = [frames.y, frames.u, frames.v] if isinstance(frames, YuvClips) else [frames]
    return [*planes, batch.visible, batch.masked]


def copies(batch: ClipBatch, device: str) -> list[torch.Tensor]:
    """Copies of a batch by a GPU that is busy, so that they happen long after `release`."""
    if device == "cpu":
        return [tensor.clone() for tensor in tensors_of(batch)]
    assert all(tensor.is_pinned() for tensor in tensors_of(batch))
    torch.cuda._sleep(LONG)
    return [tensor.to(device, non_blocking=True) for tensor in tensors_of(batch)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_copies_a_batch_before_its_buffer_is_filled_again(device: str) -> None:
    if device == "cuda":  # memory for all copies: to allocate may wait for the device
        _ = [torch.empty(2**19, dtype=torch.uint8, device=device) for _ in range(64)]
    with BatchRing(ring_config(device), CLIPS, planes=(48, 48)) as ring:
        kept = []
        for number in range(3 * ring.length):
            place = ring.places[number % ring.length]
            place.wait()
            assert place.is_free
            batch = fill(ring, number % ring.length, number)
            kept.append(copies(batch, device))
            batch.release()
            assert place.is_free == (device == "cpu")
    for number, tensors in enumerate(kept):
        assert all(bool((tensor == number).all()) for tensor in tensors), number


@pytest.mark.parametrize("device", DEVICES)
def test_a_loaders_batches_arrive_on_a_device(make_data_set, device: str) -> None:
    config = config_of(decode_workers=1, decode_threads=2, prefetch_bytes=1)
    on_device = config.model_copy(update={"cluster": ClusterConfig(use_gpu=device == "cuda")})
    data_set, kept = make_data_set(SIZES), []
    for batch in loader_of(data_set, on_device).batches(0, 6):
        kept.append(copies(batch, device))
        batch.release()
    expected = [copies(batch, "cpu") for batch in loader_of(data_set, config).batches(0, 6)]
    assert len(kept) == len(expected) == 6
    for found, wanted in zip(kept, expected, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))
