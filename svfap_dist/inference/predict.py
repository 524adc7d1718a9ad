"""What a fine-tuned network says about whole videos: `svfap predict`.

As the method's test has it: scores of a few windows from the beginning to the end of a video, and
of a few crops of each, are averaged; of classes, their probabilities (VideoMAE's released test
code, arXiv 2203.12602). Where crops or windows coincide, as crops of a square do, one is looked at
and counts for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from svfap_dist.inference.batched import look_at_all
from svfap_dist.inference.extract import BATCH_SIZE
from svfap_dist.inference.load import Network
from svfap_dist.inference.model_info import Card
from svfap_dist.inference.videos import Video
from svfap_dist.video import views as windows
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import Views, stored_region

_SHOWN = 3  # classes that a line names


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one video. label: the likeliest class; None for a regression. scores: probabilities of the
    classes, or the values of the dimensions, by name."""

    key: str
    label: str | None
    scores: dict[str, float]

    def line(self) -> str:
        """For people."""
        if self.label is None:
            return f"{self.key}: {_listed(self.scores)}"
        best = sorted(self.scores.items(), key=lambda item: -item[1])[:_SHOWN]
        return f"{self.key}: {self.label}  ({_listed(dict(best))})"


def _listed(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


@dataclasses.dataclass(frozen=True)
class Predicted:
    """Of many videos. rejected: pairs of key and reason."""

    predictions: list[Prediction]
    rejected: list[tuple[str, str]]

    def lines(self) -> list[str]:
        """For people."""
        return [
            *(prediction.line() for prediction in self.predictions),
            *(f"left out {key}: {reason}" for key, reason in self.rejected),
        ]


def predict(
    network: Network,
    videos: Sequence[Video],
    *,
    batch_size: int = BATCH_SIZE,
    threads: int = 2,
    progress: Callable[[int], None] = lambda done: None,
) -> Predicted:
    """What a fine-tuned network says about videos; `progress` hears how many are done.

    Raises: CheckpointError if the network has no head; DecodeError if not one video can be used;
    ConfigError, ShardError, StorageError.
    """
    network.check_head()
    looked = look_at_all(
        videos,
        network.card,
        views(network.card),
        scores_of(network),
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )
    predictions = [
        named(network.card, video.key, video.views.shares @ video.outputs) for video in looked.seen
    ]
    return Predicted(predictions, looked.rejected)


def views(card: Card) -> Callable[[VideoInfo], Views]:
    """The windows and crops of the method's test."""

    def choose(info: VideoInfo) -> Views:
        return Views.of(
            windows.segments(info.num_frames, card.window, card.test_segments),
            windows.squares(stored_region(info, card.region), card.test_crops),
        )

    return choose


def scores_of(network: Network) -> Callable[[Tensor], Tensor]:
    """What is averaged over clips: probabilities [B, C] of classes, values [B, K] of dimensions."""

    @torch.inference_mode()
    def scores(clips: Tensor) -> Tensor:
        found = network(clips.to(network.device))
        return found.softmax(dim=1) if network.card.kind == "classification" else found

    return scores


def named(card: Card, key: str, scores: np.ndarray) -> Prediction:
    """The prediction of scores [num_outputs]."""
    by_name = {card.name_of(number): float(score) for number, score in enumerate(scores)}
    label = card.name_of(int(scores.argmax())) if card.kind == "classification" else None
    return Prediction(key, label, by_name)
