"""What a network says of the test samples: several clips of each, their scores averaged.

Each rank tests every W-th sample; under ZeRO-3 a forward pass is a collective, so a rank that has
no more clips takes part with a black one until all are done.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.config import Config
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import ShardError
from svfap_dist.evaluate.loader import TestBatch, test_batches
from svfap_dist.evaluate.predictions import Predictions
from svfap_dist.progress import say
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import BadSample
from svfap_dist.train.labelled import Labelled

PREDICTIONS, UNTESTED = "predictions.jsonl", "untested.jsonl"


class StoppedError(Exception):
    """A rank was asked to stop before all was tested."""


@dataclasses.dataclass(frozen=True)
class Tested:
    """All ranks' predictions, and the samples that could not be tested."""

    predictions: Predictions
    bad: list[BadSample]

    def write(self, run_url: str) -> None:
        """Write predictions.jsonl, and untested.jsonl if there is anything in it."""
        if self.bad:
            rows = "".join(f"{json.dumps(dataclasses.asdict(bad))}\n" for bad in self.bad)
            storage.write_bytes(storage.join(run_url, UNTESTED), rows.encode())
        self.predictions.write(storage.join(run_url, PREDICTIONS))


def predict(
    config: Config,
    manifest: Manifest,
    world: World,
    selection: Selection,
    network: Callable[..., Tensor],
    device: torch.device,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    stops: Callable[[], bool] = lambda: False,
) -> Tested:
    """Test the selected samples; all ranks call it together and get the same.

    Call it without gradients and with the network in eval mode. `on_sample` gets how many of this
    rank's samples are done; `stops` is asked at each batch whether to give up.

    Raises: ShardError if no sample can be read; StoppedError on all ranks if one is to stop.
    """
    task = Labelled(config)
    found: dict[int, tuple[str, np.ndarray]] = {}  # by place in the selection
    bad: list[BadSample] = []
    mine = len(range(world.rank, len(selection), world.world_size))
    tested = test_batches(config, config.data.url, manifest, world, selection)
    with contextlib.closing(tested) as batches:
        for batch in _in_step(batches, stops):
            frames = batch.frames if batch is not None and len(batch.frames) else _black(config)
            scores = task.scores(network, frames.to(device))
            if batch is None:
                continue
            if len(batch.rows):
                of_samples = batch.scores(scores.double()).cpu().numpy()
                of_keys = zip(batch.keys, of_samples, strict=True)
                found |= dict(zip(batch.rows, of_keys, strict=True))
            bad += batch.bad
            on_sample(len(found) + len(bad), mine)
    return _joined(config, world, selection, [(row, *found[row]) for row in sorted(found)], bad)


def _in_step(batches: Iterator[TestBatch], stops: Callable[[], bool]) -> Iterator[TestBatch | None]:
    """The batches, and None while other ranks still have some."""
    while True:
        batch = next(batches, None)
        ranks = distributed.all_gather_object((batch is not None, stops()))
        if not any(has_one for has_one, _ in ranks):
            return
        if any(stopping for _, stopping in ranks):
            raise StoppedError
        yield batch


def _black(config: Config) -> Tensor:
    data = config.data
    shape = (1, data.num_frames, data.frame_size, data.frame_size, 3)
    return torch.zeros(shape, dtype=torch.uint8)


def _joined(
    config: Config,
    world: World,
    selection: Selection,
    rows: list[tuple[int, str, np.ndarray]],
    bad: list[BadSample],
) -> Tested:
    everyone = distributed.all_gather_object((rows, bad))
    found = sorted((row for part, _ in everyone for row in part), key=lambda row: row[0])
    missing = [sample for _, part in everyone for sample in part]
    if not found:
        raise ShardError(
            "No test sample can be read",
            where=config.data.url,
            found=f"{len(missing)} bad ones; the first: {missing[0] if missing else 'none'}",
            do="run `svfap shards verify` on data.url",
        )
    if missing and world.is_main:
        say(
            f"{len(missing)} of {len(selection)} test samples cannot be used and do not count; the "
            f"first: {missing[0].key}, {missing[0].reason}."
        )
    numbers = [row for row, _, _ in found]
    predictions = Predictions(
        keys=tuple(key for _, key, _ in found),
        labels=selection.targets[numbers],
        scores=np.stack([scores for *_, scores in found]).astype(np.float32),
    )
    return Tested(predictions, missing)
