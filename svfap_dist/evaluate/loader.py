"""Clips that are the same every time: those held out from pre-training, and those that a task is
tested on.

In: a data set, of a labelled one the samples of the test side. Out: batches of this rank's share,
in the order of the data set, frames of their own each, so that they may be kept. Nothing is random
but the masks of held-out clips, which are fixed by the sample. Bad samples have no substitutes
here: they are left out and listed.

A video is tested by several clips (see `clips`), whose scores are averaged. Those that would be
equal are made once: a clip has a share in the scores of its video, and `TestBatch.scores` adds them
up.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Generator, Sequence
from concurrent.futures import Future

import torch

from svfap_dist.config import Config
from svfap_dist.data import masking
from svfap_dist.data.clips import ClipBatch
from svfap_dist.data.ring import Ring, check_made_by_workers
from svfap_dist.data.selection import Selection
from svfap_dist.data.tries import Try, try_sample
from svfap_dist.data.workers import Cut
from svfap_dist.distributed import World
from svfap_dist.rng import Stream
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import BadSample, SampleReader

_AHEAD = 2  # batches of tested clips: one is made while another is scored


@dataclasses.dataclass(frozen=True)
class TestBatch:
    """All clips of n tested samples, sample by sample: B clips, up to segments x crops of each.

    n is 0 where all samples are bad.
    """

    __test__ = False  # no test case, whatever pytest thinks of the name

    frames: torch.Tensor  # uint8 [B, F, S, S, 3]; window by window, in each crop by crop
    owners: torch.Tensor  # int64 [B]: which of the n samples a clip is of
    shares: torch.Tensor  # float32 [B]: of a clip in its sample's scores; 1 in all per sample
    rows: list[int]  # n places in the selection
    keys: list[str]
    targets: torch.Tensor  # int64 [n] or float32 [n, K]
    bad: list[BadSample]  # left out

    def scores(self, of_clips: torch.Tensor) -> torch.Tensor:
        """Means over the clips of each sample: [B, C] to [n, C], on the device that has them."""
        device = of_clips.device
        sums = torch.zeros(len(self.rows), *of_clips.shape[1:], dtype=of_clips.dtype, device=device)
        weighted = of_clips * self.shares.to(of_clips)[:, None]
        return sums.index_add_(0, self.owners.to(device), weighted)


def test_batches(
    config: Config, url: str, manifest: Manifest, world: World, selection: Selection
) -> Generator[TestBatch]:
    """The clips that a task is tested on: finetune.test_segments windows times finetune.test_crops
    squares of each sample of the selection.

    Rank r gets every W-th sample from r on, in batches of at most train.micro_batch_size clips, but
    one sample at least. Ranks may get different numbers of batches.

    Raises: ShardError and StorageError from reading; ConfigError if clips were to be made on the
    device; ClusterError if decode workers cannot be started.
    """
    check_made_by_workers(config)
    reader = SampleReader(url, manifest)
    clips = config.finetune.test_segments * config.finetune.test_crops
    mine = range(world.rank, len(selection), world.world_size)
    size = max(1, min(config.train.micro_batch_size // clips, len(mine)))
    ahead: collections.deque[tuple[Sequence[int], int, list[Future[Try]]]] = collections.deque()
    with Ring(config, size * clips, length=_AHEAD) as ring:
        finish = functools.partial(_tested, ring, clips, selection)

        def made(place: int, row: int, index: int) -> Try:
            return try_sample(reader, ring.workers, index, Cut(None, (), place, row * clips))

        for number, first in enumerate(range(0, len(mine), size)):
            if len(ahead) == _AHEAD:
                yield finish(*ahead.popleft())
            rows, place = mine[first : first + size], number % _AHEAD
            tasks = [
                ring.pool.submit(made, place, row, int(index))
                for row, index in enumerate(selection.indices[rows])
            ]
            ahead.append((rows, place, tasks))
        while ahead:
            yield finish(*ahead.popleft())


def _tested(
    ring: Ring,
    clips: int,
    selection: Selection,
    rows: Sequence[int],
    place: int,
    tasks: Sequence[Future[Try]],
) -> TestBatch:
    tries = [task.result() for task in tasks]
    good = [number for number, each in enumerate(tries) if each.bad is None]
    counts = [len(tries[number].shares) for number in good]
    made = [number * clips + k for number, n in zip(good, counts, strict=True) for k in range(n)]
    kept = [rows[number] for number in good]
    return TestBatch(
        frames=ring.rgb[place][made],  # a copy
        owners=torch.repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
        shares=torch.tensor([share for number in good for share in tries[number].shares]),
        rows=kept,
        keys=[tries[number].key for number in good],
        targets=torch.from_numpy(selection.targets[kept]),
        bad=[each.bad for each in tries if each.bad is not None],
    )


def held_out_batches(
    config: Config, url: str, manifest: Manifest, world: World, max_clips: int
) -> Generator[ClipBatch]:
    """Fixed clips with fixed masks, for evaluation: the same ones every time.

    They are the first `max_clips` samples of the data set; rank r takes every W-th of them from r
    on, in batches of at most train.micro_batch_size, which may be kept. Bad samples are left out
    and listed. Ranks may get different numbers of clips and batches.
    """
    reader = SampleReader(url, manifest)
    indices = range(world.rank, min(max_clips, manifest.num_samples), world.world_size)
    size = min(config.train.micro_batch_size, len(indices))
    if size == 0:
        return
    with Ring(config, size, length=1) as ring:

        def made(row: int, index: int) -> Try:
            return try_sample(reader, ring.workers, index, Cut(None, (), 0, row))

        for first in range(0, len(indices), size):
            wanted = indices[first : first + size]
            tries = list(ring.pool.map(made, range(len(wanted)), wanted))
            if any(each.bad is None for each in tries):
                yield _held_out_batch(config, tries, ring.rgb[0], reader)


def _held_out_batch(
    config: Config, tries: list[Try], frames: torch.Tensor, reader: SampleReader
) -> ClipBatch:
    rows = [row for row, each in enumerate(tries) if each.bad is None]
    good = [tries[row] for row in rows]
    streams = [Stream(config.run.seed, "held-out", each.index) for each in good]
    visible, masked = masking.batch_masks(
        streams, config.mask, config.num_tubelets, config.num_patches
    )
    return ClipBatch(
        frames=frames[rows],  # a copy
        visible=visible,
        masked=masked,
        keys=[each.key for each in good],
        samples=[each.index for each in good],
        lanes=[0] * len(good),  # held-out clips have no lanes: one, in the order of the data set
        positions=[each.index for each in good],
        substituted=[False] * len(good),
        bad=[each.bad for each in tries if each.bad is not None],
        fetch_seconds=sum(each.fetch_seconds for each in tries),
        decode_seconds=sum(each.decode_seconds for each in tries),
        bytes_fetched=reader.take_bytes_fetched(),
    )
