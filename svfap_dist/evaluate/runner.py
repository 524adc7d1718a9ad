"""The one loop over the views of videos (segments x crops): decode, crop, run a network, average.

In: sources of videos (files, or samples of shards), a rule that chooses the views of each, and a
function of batches of clips. Out: for each source, in order, the function's outputs and their mean
over the views, or the reason why the video cannot be used; a bad video costs only itself. The test
of a fine-tuning, `svfap evaluate`, `svfap predict`, `svfap extract`, validation loss and probes are
this loop, so the published figure and a user's prediction cannot drift apart.

Reading and decoding run ahead in a few threads, or in killable processes; a long video is decoded
in parts, so memory grows neither with the number of videos nor with their length. Scores are
computed with one call per video: the composition of a batch may change the last bits of a matrix
product, so a video's scores would otherwise depend on its neighbors.

Shapes: V views of a video, windows * crops, the crops of a window side by side; B clips of a batch;
F frames; S pixels on a side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.config import Config, TaskConfig
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.errors import DecodeError, ShardError
from svfap_dist.evaluate.results import Predictions
from svfap_dist.evaluate.video_workers import Cuts, Decoding, UnprobedVideo, VideoWorkers
from svfap_dist.model.classifier import ACTIVATIONS
from svfap_dist.parallel.processes import ordered_map
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import BadSample, Sample, SampleReader
from svfap_dist.video.info import (
    ChooseViews,
    ClipShape,
    Crop,
    VideoInfo,
    Views,
    clip_frames,
    segment_views,
)

PREDICTIONS, UNTESTED = "predictions.jsonl", "untested.jsonl"
_PART_BYTES = 64 << 20  # decoded frames that a thread holds at a time, about
_NO_VIEWS = Views.of((), ())
log = logging.getLogger(__name__)

Source = Callable[[], Sample | UnprobedVideo | BadSample]  # reads one video


@dataclasses.dataclass(frozen=True)
class ViewedVideo:
    """A video, its views, and the function's output for each: [V, ...]."""

    key: str
    info: VideoInfo
    views: Views
    outputs: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """The outputs averaged over all views, float32."""
        return (self.views.weights @ self.outputs).astype(np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Some windows of the number-th video; without a sample, the reason why there is none."""

    number: int
    sample: Sample | BadSample
    views: Views = _NO_VIEWS
    starts: Sequence[int] = ()


def view_videos(
    sources: Iterable[Source],
    shape: ClipShape,
    choose: ChooseViews,
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int,
    decoding: Decoding,
    workers: VideoWorkers | None = None,
) -> Generator[ViewedVideo | BadSample]:
    """Yield the outputs of each video's views, or why there are none, in the order of the sources.

    Args:
        sources: read one video each; called in threads.
        shape: the network's clips.
        choose: chooses the views of a video.
        function: maps clips, uint8 [B, F, S, S, 3] on the CPU, to outputs [B, ...].
        batch_size: most clips of a call, across videos; 0: one call per video with all its views.
        decoding: threads and processes that decode.
        workers: of this decoding, kept for further calls unless this one ends early, which kills
            them; None: started and ended here.

    Raises:
        ClusterError: Decode workers cannot be started.
        SvfapError: What the sources, `choose` and `function` raise, other than DecodeError.
    """
    bad: dict[int, BadSample] = {}
    threads = decoding.threads
    with contextlib.ExitStack() as stack:
        if workers is None:
            workers = VideoWorkers(decoding)
            stack.callback(workers.close)
        opened = ordered_map(
            lambda job: _open(*job, shape, choose, workers),
            enumerate(sources),
            threads=threads,
            limit=threads + 1,
            stop=workers.kill,
        )
        stack.enter_context(contextlib.closing(opened))
        parts = ordered_map(
            lambda part: _cut(part, shape, workers),
            (part for _, parts in opened for part in parts),
            threads=threads,
            limit=threads + 1,
            stop=workers.kill,
        )
        stack.enter_context(contextlib.closing(parts))

        def clips() -> Iterator[tuple[_Part, np.ndarray]]:
            for part, found in parts:
                if isinstance(found, BadSample):
                    bad.setdefault(part.number, found)
                else:
                    yield from ((part, clip) for clip in found)

        done = 0
        rows = _outputs(_batches(clips(), batch_size), function)
        for number, group in itertools.groupby(rows, key=lambda row: row[0].number):
            viewed = list(group)
            yield from (bad.pop(other) for other in range(done, number))
            # A later part of the video may have failed after its first clips were good.
            yield bad.pop(number, None) or _viewed(viewed)
            done = number + 1
        yield from (bad[number] for number in sorted(bad))


def view_sample(sample: Sample, shape: ClipShape, choose: ChooseViews) -> Tensor:
    """Return the clips of one video's views, uint8 [V, F, S, S, 3].

    Args:
        sample: the video.
        shape: the network's clips.
        choose: chooses the views.

    Raises:
        DecodeError: The video cannot be decoded.
    """
    chosen = choose(sample.info)
    starts = list(chosen.starts)
    cuts = _cuts(sample, starts, list(chosen.crops), shape)
    return torch.from_numpy(cuts.of_video(sample.video))


def _open(
    number: int, source: Source, shape: ClipShape, choose: ChooseViews, workers: VideoWorkers
) -> list[_Part]:
    """Return a video in parts: consecutive windows whose decoded frames take _PART_BYTES."""
    sample = source()
    if isinstance(sample, UnprobedVideo):
        sample = workers.probe(sample)
    if isinstance(sample, BadSample):
        return [_Part(number, sample)]
    try:
        chosen = choose(sample.info)
    except DecodeError as error:
        bad = BadSample(sample.index, sample.key, error.reason, str(error))
        return [_Part(number, bad)]
    starts, info = list(chosen.starts), sample.info
    most = max(_PART_BYTES // (info.width * info.height * 3 * shape.num_frames), 1)
    return [
        _Part(number, sample, chosen, starts[first : first + most])
        for first in range(0, len(starts), most)
    ]


def _cuts(sample: Sample, starts: Sequence[int], crops: Sequence[Crop], shape: ClipShape) -> Cuts:
    info = sample.info
    numbers = [
        clip_frames(start, shape.num_frames, shape.sampling_rate, info.num_frames)
        for start in starts
    ]
    return Cuts(info, np.array(numbers), crops, shape.frame_size)


def _cut(part: _Part, shape: ClipShape, workers: VideoWorkers) -> np.ndarray | BadSample:
    """Return the clips of a part, or why there are none."""
    sample = part.sample
    if isinstance(sample, BadSample):
        return sample
    return workers.cut(sample, _cuts(sample, part.starts, list(part.views.crops), shape))


def _batches(
    clips: Iterator[tuple[_Part, np.ndarray]], batch_size: int
) -> Iterator[list[tuple[_Part, np.ndarray]]]:
    """Group clips: `batch_size` at a time, or for 0 all those of a video."""
    if not batch_size:
        for _, group in itertools.groupby(clips, key=lambda clip: clip[0].number):
            yield list(group)
        return
    while batch := list(itertools.islice(clips, batch_size)):
        yield batch


def _outputs(
    batches: Iterable[list[tuple[_Part, np.ndarray]]], function: Callable[[Tensor], Tensor]
) -> Iterator[tuple[_Part, np.ndarray]]:
    for batch in batches:
        outputs = function(torch.from_numpy(np.stack([clip for _, clip in batch])))
        yield from zip((part for part, _ in batch), outputs.cpu().numpy(), strict=True)


def _viewed(rows: list[tuple[_Part, np.ndarray]]) -> ViewedVideo:
    part = rows[0][0]
    sample = cast(Sample, part.sample)
    outputs = np.stack([output for _, output in rows])
    return ViewedVideo(sample.key, sample.info, part.views, outputs)


def to_scores(outputs: Tensor, kind: str, activation: str) -> Tensor:
    """Return what is averaged over views: float32 class probabilities, or values.

    Args:
        outputs: of the classifier, [B, C] logits or [B, K] values.
        kind: of the task: classification or regression.
        activation: of a regression's outputs, a key of `classifier.ACTIVATIONS`.
    """
    outputs = outputs.float()
    return (
        outputs.softmax(dim=1) if kind == "classification" else ACTIVATIONS[activation]()(outputs)
    )


class StoppedError(Exception):
    """A rank received notice to stop before the test was done."""


@dataclasses.dataclass(frozen=True)
class TestedSelection:
    """All ranks' predictions, and the samples that could not be tested."""

    __test__ = False  # not a test case, whatever pytest infers from the name

    predictions: Predictions
    bad: list[BadSample]

    def write(self, run_url: str) -> None:
        """Write predictions.jsonl, and untested.jsonl if there are bad samples.

        Args:
            run_url: folder or prefix of the run.
        """
        if self.bad:
            rows = "".join(f"{json.dumps(dataclasses.asdict(bad))}\n" for bad in self.bad)
            storage.write_bytes(storage.join(run_url, UNTESTED), rows.encode())
        self.predictions.write(storage.join(run_url, PREDICTIONS))


class LockstepFunction:
    """A function of clips that all ranks call in lockstep: at ZeRO-3, networks are collectives.

    A rank without further clips joins in with a black one until all ranks are done. Calls and
    `finish` raise StoppedError on all ranks once one is to stop.

    Args:
        function: maps clips to outputs.
        shape: of the clips.
        stops: returns whether this rank is to stop.
    """

    def __init__(
        self, function: Callable[[Tensor], Tensor], shape: ClipShape, stops: Callable[[], bool]
    ) -> None:
        self._function, self._stops = function, stops
        self._black = torch.zeros(
            (1, shape.num_frames, shape.frame_size, shape.frame_size, 3), dtype=torch.uint8
        )

    def __call__(self, clips: Tensor) -> Tensor:
        """Return the function's outputs of this rank's clips.

        Args:
            clips: uint8 [B, F, S, S, 3].
        """
        self._agree(has_clips=True)
        return self._function(clips)

    def finish(self) -> None:
        """Join in the forward passes of the ranks that still have clips."""
        while self._agree(has_clips=False):
            self._function(self._black)

    def _agree(self, has_clips: bool) -> bool:
        ranks = distributed.all_gather_object((has_clips, self._stops()))
        if not any(has_clips for has_clips, _ in ranks):
            return False
        if any(stops for _, stops in ranks):
            raise StoppedError
        return True


def score_selection(
    config: Config,
    manifest: Manifest,
    world: World,
    selection: Selection,
    network: Callable[..., Tensor],
    device: torch.device,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    stops: Callable[[], bool] = lambda: False,
) -> TestedSelection:
    """Test the selected samples by multi-view testing; all ranks call it and get the same result.

    Rank r scores every W-th sample. Call it without gradients, with the network in eval mode.

    Args:
        config: [task], [data] and [finetune] say how the samples are tested.
        manifest: of the training data, which has the test samples.
        world: this rank and the number of ranks.
        selection: samples to test, and their targets.
        network: maps uint8 frames [B, F, S, S, 3] to outputs [B, C].
        device: where the network is.
        on_sample: called with the samples that this rank has done, and how many it has.
        stops: returns whether this rank received notice to stop; called before each forward pass.

    Raises:
        ShardError: No sample can be read.
        StoppedError: On all ranks, once one is to stop.
    """
    task, data, finetune = cast(TaskConfig, config.task), config.data, config.finetune
    reader = SampleReader(data.url, manifest)
    mine = range(world.rank, len(selection.indices), world.world_size)
    scores = LockstepFunction(
        lambda clips: to_scores(network(clips.to(device)), task.kind, finetune.output), data, stops
    )
    found: list[tuple[int, str, np.ndarray]] = []
    bad: list[BadSample] = []
    videos = view_videos(
        [functools.partial(reader.read, int(selection.indices[row])) for row in mine],
        data,
        segment_views(data, data.region, finetune.test_segments, finetune.test_crops),
        scores,
        batch_size=0,
        decoding=Decoding.of(data, config.decode.backend),
    )
    with contextlib.closing(videos):
        for done, (row, video) in enumerate(zip(mine, videos, strict=True), start=1):
            if isinstance(video, BadSample):
                bad.append(video)
            else:
                found.append((row, video.key, video.mean))
            on_sample(done, len(mine))
    scores.finish()
    return _joined(", ".join(data.urls), world, selection, found, bad)


def _joined(
    url: str,
    world: World,
    selection: Selection,
    rows: list[tuple[int, str, np.ndarray]],
    bad: list[BadSample],
) -> TestedSelection:
    ranks = distributed.all_gather_object((rows, bad))
    found = sorted((row for part, _ in ranks for row in part), key=lambda row: row[0])
    missing = [sample for _, part in ranks for sample in part]
    if not found:
        raise ShardError(
            "No test sample can be read",
            where=url,
            found=f"{len(missing)} bad ones; the first: {missing[0] if missing else 'none'}",
            do="run `svfap shards verify` on data.url",
        )
    if missing and world.is_main:
        log.warning(
            "%d of %d test samples cannot be used and do not count; the first: %s, %s.",
            len(missing),
            len(selection.indices),
            missing[0].key,
            missing[0].reason,
        )
    predictions = Predictions(
        keys=tuple(key for _, key, _ in found),
        labels=selection.targets[[row for row, _, _ in found]],
        scores=np.stack([scores for *_, scores in found]),
    )
    return TestedSelection(predictions, missing)
