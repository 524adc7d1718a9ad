"""The validation loss: on a fixed set of clips with fixed masks, shared by all ranks.

In: the first samples of data.eval_url. Out: their mean loss, and a picture for trackers. The clips
are decoded once and kept, since there are few. Under ZeRO-3 every forward pass is a collective, so
all ranks make equally many: a rank with fewer batches repeats one with weight 0.
"""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
import torch.distributed as dist
from torch import Tensor

from svfap_dist import distributed
from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.filler import BatchSlots
from svfap_dist.distributed import World
from svfap_dist.errors import ShardError
from svfap_dist.evaluate.reconstruction import grid_rows, reconstruct
from svfap_dist.evaluate.runner import Decoding, ViewedVideo, view_videos
from svfap_dist.model import patches
from svfap_dist.model.sizes import size_of_build
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import BadSample, SampleReader
from svfap_dist.train.engine import Engine
from svfap_dist.train.objective import build_arguments
from svfap_dist.video import image_grid
from svfap_dist.video.info import middle_view

log = logging.getLogger(__name__)

MAX_CLIPS = 64
_READ_BYTES = 8 << 20  # at a time, by all ranks together: many ranks need one sample each


class ValidationSet:
    """This rank's share of the clips of `data.eval_url`.

    Args:
        config: The recipe; it has a data.eval_url.
        world: This rank's place among all ranks.
        manifest: Manifest of data.eval_url.

    Raises:
        ShardError: On every rank, if the clips cannot be read on any.
        StorageError: Likewise, if the store fails.
    """

    def __init__(self, config: Config, world: World, manifest: Manifest) -> None:
        self._config, url = config, config.data.eval_url
        mine = distributed.run_on_all_ranks(
            lambda: validation_batches(config, url, manifest, world, MAX_CLIPS)
        )
        counts = [int(row[0]) for row in distributed.all_gather_numbers([len(mine)])]
        if not any(counts):
            found = f"{manifest.num_samples} samples, none readable"
            do = "run `svfap shards verify` on data.eval_url"
            raise ShardError("No validation clip can be used", url, found, do)
        self._rounds = [(batch, len(batch.frames)) for batch in mine]
        if min(counts) < max(counts):
            spare = mine[0] if mine else None
            if min(counts) == 0:  # one rank sends a clip: from each that has some, it is 100 MB
                src = next(rank for rank, count in enumerate(counts) if count)
                sent = distributed.broadcast_object(_one_clip(mine[0]) if mine else None, src)
                spare = mine[0] if mine else sent
            assert spare is not None
            self._rounds += [(spare, 0)] * (max(counts) - len(mine))

    def loss(self, engine: Engine) -> float:
        """Return the mean loss over the clips of all ranks; a collective.

        Args:
            engine: Engine of the run.
        """
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for batch, weight in self._rounds:
                loss = engine.forward(batch, slice(None)).double()
                total += torch.stack([loss * weight, torch.full_like(loss, weight)])
        dist.all_reduce(total)
        return (total[0] / total[1]).item()

    def picture(self, engine: Engine) -> bytes | None:
        """Return a PNG of this rank's first clip and its reconstruction; collective under ZeRO-3.

        Args:
            engine: Engine of the run.

        Returns:
            The file's content; None, with a warning, if the picture cannot be drawn.
        """
        batch, _ = self._rounds[0]
        assert isinstance(batch.frames, Tensor)  # `validation_batches` decodes to RGB
        frames, dtype = batch.frames[:1].to(engine.device), getattr(torch, self._config.train.dtype)
        size = size_of_build(build_arguments(self._config))

        def predict(frames: Tensor, visible: Tensor, masked: Tensor) -> Tensor:
            seen = patches.visible_patches(frames, visible, size.patch).to(dtype)
            return engine.eager_network(seen, visible, masked)

        stream = Stream(self._config.run.seed, "picture")
        with engine.evaluating():
            rows = reconstruct(predict, size, frames, self._config.mask, stream)
        try:
            return image_grid.png_of(image_grid.draw_grid(grid_rows(rows, batch.keys[0])))
        except Exception as error:  # trackers do without it
            log.warning("No picture of the reconstruction: %s", error)
            return None


def validation_batches(
    config: Config, url: str, manifest: Manifest, world: World, max_clips: int
) -> list[ClipBatch]:
    """Return this rank's clips with fixed masks: the middle window, the whole region.

    They are the first samples of the data set; rank r takes every W-th of them. Bad samples are
    left out and listed. Ranks may get different numbers of clips and batches.

    Args:
        config: The recipe.
        url: URL of the data set.
        manifest: Manifest of the data set.
        world: This rank's place among all ranks.
        max_clips: Maximum number of samples, over all ranks.

    Raises:
        ShardError: If the data set cannot be read.
        StorageError: If the store fails.
    """
    reader = SampleReader(url, manifest, range_bytes=_READ_BYTES // world.world_size)
    indices = range(world.rank, min(max_clips, manifest.num_samples), world.world_size)
    found = list(
        view_videos(
            [functools.partial(reader.read, index) for index in indices],
            config.data,
            middle_view(config.data, config.data.region),
            lambda clips: clips,
            batch_size=1,
            decoding=Decoding.of(config.data, config.decode.backend),
        )
    )
    numbered, size = list(zip(indices, found, strict=True)), config.train.micro_batch_size
    groups = [numbered[first : first + size] for first in range(0, len(numbered), size)]
    return [batch for group in groups if (batch := _batch(config, group)) is not None]


def _batch(config: Config, group: list[tuple[int, ViewedVideo | BadSample]]) -> ClipBatch | None:
    good = [(index, video) for index, video in group if isinstance(video, ViewedVideo)]
    if not good:
        return None
    streams = [Stream(config.run.seed, "held-out", index) for index, _ in good]
    visible, masked = masking.batch_masks(
        streams, config.mask, config.num_tubelets, config.num_patches
    )
    slots = BatchSlots(
        keys=[video.key for _, video in good],
        samples=[index for index, _ in good],
        lanes=[0] * len(good),  # validation has no lanes: one, in the order of the data set
        positions=[index for index, _ in good],
        substituted=[False] * len(good),
    )
    return ClipBatch(
        frames=torch.cat([torch.from_numpy(video.outputs) for _, video in good]),
        visible=visible,
        masked=masked,
        packed_slots=[slots.pack()],
        bad=[video for _, video in group if isinstance(video, BadSample)],
        fetch_seconds=0.0,
        decode_seconds=0.0,
    )


def _one_clip(batch: ClipBatch) -> ClipBatch:
    return dataclasses.replace(
        batch, frames=batch.frames[:1], visible=batch.visible[:1], masked=batch.masked[:1]
    )
