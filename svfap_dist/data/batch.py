"""A batch of clips, and the ring of buffers in which batches are prefetched.

In: the recipe and the number of clips of a batch. Out: memory that workers write to and the rank
reads tensors from. A buffer is filled again once its batch is released: the consumer has read it,
or, on a GPU, the device has copied it, as a CUDA event shows without making the host wait. So the
ring bounds the memory of everything that is prefetched.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.clips import Shapes, SharedArrays, array_shapes, ring_length
from svfap_dist.data.filler import BatchSlots, FilledBatch, PackedSlots
from svfap_dist.data.selection import Selection
from svfap_dist.rng import Stream
from svfap_dist.shards.format import BadSample
from svfap_dist.video.backends import capabilities
from svfap_dist.video.frames import YuvClips

_FRAMES = ("rgb", "y", "u", "v", "crops", "kinds")  # arrays of frames


class RingPlace:
    """A buffer of the ring, in use until the copies of its batch to a device are done.

    Args:
        event: CUDA event of its own, where batches are copied to a GPU; None: the consumer is done
            with a batch when it requests the next one.
    """

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event
        self._is_released = True

    def use(self) -> None:
        """Mark the buffer as in use by a batch."""
        self._is_released = False

    def release(self) -> None:
        """Mark the buffer as released: all copies are queued, on the current stream."""
        if not self._is_released and self._event is not None:
            self._event.record()
        self._is_released = True

    @property
    def is_free(self) -> bool:
        """Whether the released buffer may be overwritten now."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Wait until the released buffer may be overwritten."""
        if self._event is not None:
            self._event.synchronize()


@dataclasses.dataclass(frozen=True)
class ClipBatch:
    """A rank's clips of one step, in slot order.

    A slot has one clip, or data.repeated_sampling consecutive clips of one sample: B clips in all.
    """

    frames: torch.Tensor | YuvClips  # uint8 [B, F, H, W, 3], or planes; see `frames_on`
    visible: torch.Tensor  # int32 or int64 [B, V], tokens that the encoder sees
    masked: torch.Tensor  # the same type [B, M], tokens that the decoder predicts
    packed_slots: Sequence[PackedSlots]  # see `slots`
    bad: list[BadSample]
    fetch_seconds: float  # summed over the clips, as spent by threads
    decode_seconds: float  # summed over the clips, as spent by threads or workers
    bytes_fetched: int = 0  # from the store, since the batch before
    batches_ready: int = 0  # prefetched when this one was requested, itself included
    # Targets of the clips shown, substituted or not: classes int64 [B], or values float32 [B, K].
    targets: torch.Tensor | None = None
    # int64 [B, 2], of each clip's stream (`rng.digest`), where the device augments.
    digests: torch.Tensor | None = None
    sources: torch.Tensor | None = None  # int64 [B], number of each clip's source in a mixture
    ledger: bytes = b""  # lines for the run's ledger, if it has one
    place: RingPlace | None = None  # of the ring whose memory the tensors are

    @property
    def num_slots(self) -> int:
        """Return the number of slots."""
        return sum(packed.count for packed in self.packed_slots)

    @functools.cached_property
    def slots(self) -> BatchSlots:
        """Return lists with an entry per slot, unpacked on first use."""
        parts = [vars(packed.unpack()).values() for packed in self.packed_slots]
        return BatchSlots(*(list(itertools.chain(*lists)) for lists in zip(*parts, strict=True)))

    @property
    def keys(self) -> list[str]:
        """Return the keys of the samples that the order chose, one per slot."""
        return self.slots.keys

    def frames_on(self, device: torch.device, part: slice) -> torch.Tensor:
        """Return frames of some clips on a device: uint8 RGB [B, F, H, W, 3].

        Args:
            device: Where to copy them, asynchronously.
            part: Which of the clips.
        """
        frames = self.frames[part]
        if isinstance(frames, torch.Tensor):
            return frames.to(device, non_blocking=True)
        return frames.to_rgb(device)

    def streams(self, part: slice) -> list[Stream]:
        """Return the random streams of clips that the device augments; of others, [].

        Args:
            part: Which of the clips.
        """
        if self.digests is None:
            return []
        return [Stream.of_digest(words) for words in self.digests[part].numpy().view(np.uint64)]

    def release(self) -> None:
        """Let the tensors be overwritten once the copies queued on the current stream are done.

        A batch that is not released is when the next one is requested.
        """
        if self.place is not None:
            self.place.release()


def ring_shapes(
    config: Config,
    length: int,
    clips: int,
    planes: tuple[int, int] | None = None,
    selection: Selection | None = None,
) -> Shapes:
    """Return all arrays of a ring: frames, indices of tokens, targets, digests of streams.

    Args:
        config: Recipe.
        length: Number of batches.
        clips: Clips per batch.
        planes: Largest height and width of planes; None: RGB.
        selection: Has the targets; None: there are none.
    """
    tokens = {"visible": 0, "masked": 0}
    if config.task is None:
        split = masking.split_tokens(
            Stream("shape"), config.mask, config.num_tubelets, config.num_patches
        )
        tokens = {"visible": len(split.visible), "masked": len(split.masked)}
    shapes = dict(array_shapes(config.data, length, clips, planes))
    shapes |= {name: ("int32", (length, clips, count)) for name, count in tokens.items()}
    if config.data.is_mixture:
        shapes["sources"] = ("int64", (length, clips))
    if selection is not None:
        kind, columns = selection.targets.dtype.name, selection.targets.shape[1:]
        shapes["targets"] = (kind, (length, clips, *columns))
    if config.augments_on_device:
        shapes["digests"] = ("int64", (length, clips, 2))
    return shapes


class BatchRing:
    """Buffers for batches, in shared memory; frames decoded on a device are in its memory.

    A context manager, which pins the memory for copies to a GPU.

    Args:
        config: Recipe.
        clips: Clips per batch.
        planes: Largest height and width of planes, where workers do not convert colors; None: RGB.
        selection: Has the targets; None: there are none.
    """

    def __init__(
        self,
        config: Config,
        clips: int,
        planes: tuple[int, int] | None = None,
        selection: Selection | None = None,
    ) -> None:
        on_gpu = config.cluster.on_gpu
        self._size, self._is_pinned = config.data.frame_size, on_gpu
        self.length = ring_length(config.data, clips, planes)
        shapes = dict(ring_shapes(config, self.length, clips, planes, selection))
        decoded: dict[str, torch.Tensor] = {}
        if capabilities(config.decode.backend).batched:
            _, shape = shapes.pop("rgb")
            device = "cuda" if on_gpu else "cpu"
            decoded["rgb"] = torch.empty(shape, dtype=torch.uint8, device=device)
        self.shared = SharedArrays(shapes)
        arrays = {name: torch.from_numpy(a) for name, a in self.shared.arrays.items()}
        self.tensors: Mapping[str, torch.Tensor] = decoded | arrays  # [length, B, ...] each
        self.places = [
            RingPlace(torch.cuda.Event() if on_gpu else None) for _ in range(self.length)
        ]
        self._frames = [self.frames(place) for place in range(self.length)]

    def frames(self, place: int) -> torch.Tensor | YuvClips:
        """Return the frames of a batch.

        Args:
            place: Index of its buffer.
        """
        if "rgb" in self.tensors:
            return self.tensors["rgb"][place]
        planes = {name: self.tensors[name][place] for name in _FRAMES if name in self.tensors}
        return YuvClips(**planes, size=self._size)

    def batch(self, place: int, parts: Sequence[FilledBatch], ready: int) -> ClipBatch:
        """Return the batch of a buffer whose parts are filled.

        Args:
            place: Index of the buffer.
            parts: In the order of their rows.
            ready: Batches that were ready when this one was requested.
        """
        self.places[place].use()
        tensors = self.tensors
        return ClipBatch(
            frames=self._frames[place],
            visible=tensors["visible"][place],
            masked=tensors["masked"][place],
            packed_slots=[part.slots for part in parts],
            bad=[bad for part in parts for bad in part.bad],
            fetch_seconds=sum(part.fetch_seconds for part in parts),
            decode_seconds=sum(part.decode_seconds for part in parts),
            bytes_fetched=sum(part.bytes_fetched for part in parts),
            batches_ready=ready,
            targets=tensors["targets"][place] if "targets" in tensors else None,
            digests=tensors["digests"][place] if "digests" in tensors else None,
            sources=tensors["sources"][place] if "sources" in tensors else None,
            ledger=b"".join(part.ledger for part in parts),
            place=self.places[place],
        )

    def __enter__(self) -> BatchRing:
        shared = self.shared
        if self._is_pinned:  # copies to the GPU then overlap with computation
            torch.cuda.check_error(_cuda().cudaHostRegister(shared.address, shared.num_bytes, 0))
        return self

    def __exit__(self, *_: object) -> None:
        for place in self.places:
            place.wait()
        self.shared.close()
        if self._is_pinned:
            torch.cuda.check_error(_cuda().cudaHostUnregister(self.shared.address))


def _cuda() -> Any:
    return torch.cuda.cudart()
