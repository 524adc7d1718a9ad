"""Predictions of a fine-tuned network for whole videos: `svfap predict`.

Multi-view testing, by the code that computes the published figures (`evaluate.runner`): the scores
of a few windows from the beginning to the end of a video, and of a few crops of each, are averaged;
for classes, their probabilities (VideoMAE's released test code, arXiv 2203.12602). Views that
coincide, as the crops of a square video do, are computed once and weighted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from svfap_dist.evaluate.runner import to_scores
from svfap_dist.evaluate.video_workers import Decoding
from svfap_dist.inference.extract import rejections
from svfap_dist.inference.load import Network
from svfap_dist.inference.videos import Video, view_all
from svfap_dist.model.weights import ModelInfo
from svfap_dist.video.info import segment_views

_SHOWN = 3  # classes that a line names


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The prediction for one video.

    label: the class with the highest score; None for a regression. scores: probabilities of the
    classes, or the values of the dimensions, by name.
    """

    key: str
    label: str | None
    scores: dict[str, float]

    def line(self) -> str:
        """Return a line to print."""
        if self.label is None:
            return f"{self.key}: {_format(self.scores)}"
        best = sorted(self.scores.items(), key=lambda item: -item[1])[:_SHOWN]
        return f"{self.key}: {self.label}  ({_format(dict(best))})"


def _format(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


@dataclasses.dataclass(frozen=True)
class PredictResult:
    """Predictions for many videos. rejected: pairs of key and reason."""

    predictions: list[Prediction]
    rejected: list[tuple[str, str]]

    def lines(self) -> list[str]:
        """Return a summary to print."""
        return [
            *(prediction.line() for prediction in self.predictions),
            *(f"left out {key}: {reason}" for key, reason in self.rejected),
        ]


def predict(
    network: Network,
    videos: Sequence[Video],
    *,
    batch_size: int = 0,
    threads: int = 2,
    isolated: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> PredictResult:
    """Return the predictions of a fine-tuned network for videos.

    Args:
        network: from `svfap_dist.load`, with a head.
        videos: from `list_videos`.
        batch_size: most clips of a forward pass; 0: all views of a video, as in the test.
        threads: threads that read and decode.
        isolated: whether videos are decoded in processes, which one that hangs or crashes cannot
            take down; a script then needs `if __name__ == "__main__":` around its main part.
        progress: called with the number of videos done.

    Raises:
        CheckpointError: The network has no head.
        DecodeError: No video can be used.
        ConfigError: Shards were cut to another region.
        ShardError: Shards cannot be read.
        StorageError: The store fails.
    """
    network.check_head()
    info = network.info

    @torch.inference_mode()
    def scores(clips: Tensor) -> Tensor:
        return to_scores(network.outputs(clips.to(network.device)), info.kind, info.activation)

    viewed, bad = view_all(
        [video.read for video in videos],
        info,
        segment_views(info, info.region, info.test_segments, info.test_crops),
        scores,
        batch_size=batch_size,
        decoding=Decoding.of_files(threads, isolated),
        progress=progress,
    )
    predictions = [_prediction(info, video.key, video.mean) for video in viewed]
    return PredictResult(predictions, rejections(bad))


def _prediction(info: ModelInfo, key: str, scores: np.ndarray) -> Prediction:
    # float32's shortest digits, as in predictions.jsonl
    by_name = {info.name_of(number): float(str(score)) for number, score in enumerate(scores)}
    label = info.name_of(int(scores.argmax())) if info.kind == "classification" else None
    return Prediction(key, label, by_name)
