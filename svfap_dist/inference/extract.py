"""Features of whole videos: `svfap_dist.extract` for one, `svfap extract` for many.

In: a network and videos. Out: float32 features of clips that cover each whole video, every `step`
frames, and an .npz that numpy reads without pickle:

    keys, fps, num_frames, labels   [V] of each video; labels: JSON of what its shard says
    features [C, D], starts [C]     of each clip; starts: its first frame
    videos   [C]                    its video, as an index into keys
    rejected, reasons               keys of videos that could not be used, and why
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from svfap_dist import storage
from svfap_dist.evaluate.runner import ViewedVideo
from svfap_dist.evaluate.video_workers import Decoding
from svfap_dist.inference.load import Network
from svfap_dist.inference.videos import Video, read_video, view_all
from svfap_dist.shards.reader import BadSample
from svfap_dist.video.info import covering_views

BATCH_SIZE = 8  # clips of a forward pass


def extract(
    network: Network, video: str | os.PathLike[str] | bytes, *, step: int = 0
) -> np.ndarray:
    """Return the features of a video, float32 [clips, D], computed where the network is.

    A clip spans network.info.window frames; one more clip ends with the video. A video shorter than
    a clip is one clip, in which its last frame repeats.

    Args:
        network: from `svfap_dist.load`.
        video: a path, a URL, or the bytes of a file.
        step: frames from one clip to the next; 0: end to end.

    Raises:
        DecodeError: The video cannot be used.
        ConfigError: The step is negative.
        StorageError: The store fails.
    """
    source = video if isinstance(video, bytes) else os.fspath(video)
    (viewed,), _ = view_all(
        [lambda: read_video(source)],
        network.info,
        covering_views(network.info, network.info.region, step),
        features_of(network),
        batch_size=BATCH_SIZE,
        decoding=Decoding(threads=1),
    )
    return viewed.outputs


def features_of(network: Network) -> Callable[[Tensor], Tensor]:
    """Return the function from clips to their features, on the CPU or the network's device.

    Args:
        network: from `svfap_dist.load`.
    """

    @torch.inference_mode()
    def features(clips: Tensor) -> Tensor:
        return network.features(clips.to(network.device))

    return features


@dataclasses.dataclass(frozen=True)
class ExtractResult:
    """Features of many videos. rejected: pairs of key and reason."""

    output: str
    videos: int
    clips: int
    dim: int
    rejected: list[tuple[str, str]]

    def lines(self) -> list[str]:
        """Return a summary to print."""
        return [
            *(f"left out {key}: {reason}" for key, reason in self.rejected),
            f"{self.output}: {self.clips} clips of {self.videos} videos, {self.dim} features each",
        ]


def extract_to(
    network: Network,
    videos: Sequence[Video],
    output: str,
    *,
    step: int = 0,
    batch_size: int = BATCH_SIZE,
    threads: int = 2,
    isolated: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> ExtractResult:
    """Write the features of many videos to an .npz, atomically.

    Args:
        network: from `svfap_dist.load`.
        videos: from `list_videos`.
        output: path or URL of the .npz.
        step: frames from one clip to the next; 0: end to end.
        batch_size: most clips of a forward pass.
        threads: threads that read and decode.
        isolated: whether videos are decoded in processes, which one that hangs or crashes cannot
            take down; a script then needs `if __name__ == "__main__":` around its main part.
        progress: called with the number of videos done.

    Raises:
        DecodeError: No video can be used.
        ConfigError: The step is negative.
        ShardError: Shards cannot be read.
        StorageError: The store fails.
    """
    viewed, bad = view_all(
        [video.read for video in videos],
        network.info,
        covering_views(network.info, network.info.region, step),
        features_of(network),
        batch_size=batch_size,
        decoding=Decoding.of_files(threads, isolated),
        progress=progress,
    )
    rejected = rejections(bad)
    storage.write_bytes(output, _to_npz(viewed, rejected))
    clips, dim = sum(len(video.outputs) for video in viewed), viewed[0].outputs.shape[1]
    return ExtractResult(output, len(viewed), clips, dim, rejected)


def rejections(bad: Sequence[BadSample]) -> list[tuple[str, str]]:
    """Return key and reason of each video that could not be used.

    Args:
        bad: the videos.
    """
    return [(video.key, f"{video.reason}: {video.detail}") for video in bad]


def _to_npz(viewed: Sequence[ViewedVideo], rejected: list[tuple[str, str]]) -> bytes:
    """Return the .npz described at the top of the module."""
    counts = [len(video.outputs) for video in viewed]
    file = io.BytesIO()
    np.savez(
        file,
        keys=np.array([video.key for video in viewed]),
        fps=np.array([video.info.fps for video in viewed]),
        num_frames=np.array([video.info.num_frames for video in viewed]),
        labels=np.array([json.dumps(video.info.labels) for video in viewed]),
        features=np.concatenate([video.outputs for video in viewed]),
        starts=np.concatenate([np.array(list(video.views.starts)) for video in viewed]),
        videos=np.repeat(np.arange(len(viewed)), counts),
        rejected=np.array([key for key, _ in rejected], dtype=str),
        reasons=np.array([reason for _, reason in rejected], dtype=str),
    )
    return file.getvalue()
