"""The loss on clips that are never trained on: a fixed set with fixed masks, shared by all ranks.

The clips are decoded once and kept, since there are few. Under ZeRO-3 every forward pass is a
collective, so all ranks make equally many: a rank with fewer batches repeats one and counts it as
nothing.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist

from svfap_dist import distributed
from svfap_dist.config import Config
from svfap_dist.data.clips import ClipBatch
from svfap_dist.distributed import World
from svfap_dist.errors import ShardError
from svfap_dist.evaluate.loader import held_out_batches
from svfap_dist.shards.reader import open_data
from svfap_dist.train.engine import Engine

MAX_CLIPS = 64


class HeldOut:
    """This rank's part of the held-out clips of `data.eval_url`.

    Raises: ShardError, StorageError: on every rank, if the clips cannot be read on any.
    """

    def __init__(self, config: Config, world: World) -> None:
        url = config.data.eval_url
        manifest = distributed.run_on_all_ranks(lambda: open_data(config, url))
        mine = distributed.run_on_all_ranks(
            lambda: list(held_out_batches(config, url, manifest, world, MAX_CLIPS))
        )
        counts = distributed.all_gather_object(len(mine))
        if not any(counts):
            raise ShardError(
                "No held-out clip can be used",
                where=url,
                found=f"{manifest.num_samples} samples, none readable",
                do="run `svfap shards verify` on data.eval_url",
            )
        self._rounds = [(batch, len(batch.frames)) for batch in mine]
        if min(counts) < max(counts):
            spare = mine[0] if mine else None
            if min(counts) == 0:
                spares = distributed.all_gather_object(_one_clip(mine[0]) if mine else None)
                spare = next(batch for batch in spares if batch is not None)
            assert spare is not None
            self._rounds += [(spare, 0)] * (max(counts) - len(mine))

    def loss(self, engine: Engine) -> float:
        """Mean loss over the clips of all ranks; all ranks call it together and get the same."""
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)
        with engine.evaluating():
            for batch, weight in self._rounds:
                loss = engine.forward(batch, slice(None)).double()
                total += torch.stack([loss * weight, torch.full_like(loss, weight)])
        dist.all_reduce(total)
        return (total[0] / total[1]).item()


def _one_clip(batch: ClipBatch) -> ClipBatch:
    return dataclasses.replace(
        batch, frames=batch.frames[:1], visible=batch.visible[:1], masked=batch.masked[:1]
    )
