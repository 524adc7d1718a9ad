"""Features of whole videos: `svfap_dist.extract` for one, `svfap extract` for many.

In: a network and videos. Out: float32 features of clips laid over each whole video, every `step`
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
from svfap_dist.errors import ConfigError
from svfap_dist.inference.batched import Looked, look_at_all
from svfap_dist.inference.load import Network
from svfap_dist.inference.model_info import Card
from svfap_dist.inference.videos import Video, read
from svfap_dist.video import views as windows
from svfap_dist.video.info import VideoInfo
from svfap_dist.video.views import Views, stored_region

BATCH_SIZE = 8  # clips that go through the network at a time


def extract(
    network: Network, video: str | os.PathLike[str] | bytes, *, step: int = 0
) -> np.ndarray:
    """Features of a video (path, URL or bytes), float32 [clips, D], on whatever device the network
    is.

    Clips span network.card.window frames and begin every `step` frames (0: end to end); one more
    ends with the video. A video shorter than a clip is one clip that ends with its last frame, over
    and over.

    Raises: DecodeError if the video cannot be used; ConfigError for a negative step; StorageError.
    """
    source = video if isinstance(video, bytes) else os.fspath(video)
    key = f"{len(source)} bytes" if isinstance(source, bytes) else source
    looked = look_at_all(
        [Video(key, lambda: read(source))],
        network.card,
        views(network.card, step),
        features_of(network),
        batch_size=BATCH_SIZE,
        threads=1,
        progress=lambda done: None,
    )
    return looked.seen[0].outputs


def views(card: Card, step: int) -> Callable[[VideoInfo], Views]:
    """Windows over a whole video, every `step` frames, and of each the middle square of the region.

    Raises: ConfigError for a negative step.
    """
    if step < 0:
        raise ConfigError(
            "Wrong step", where="step", found=str(step), do="give frames from clip to clip"
        )
    stride = step or card.num_frames * card.sampling_rate

    def choose(info: VideoInfo) -> Views:
        starts = windows.covering(info.num_frames, card.window, stride)
        return Views.of(starts, windows.squares(stored_region(info, card.region), 1))

    return choose


def features_of(network: Network) -> Callable[[Tensor], Tensor]:
    """The network's features [B, D] of clips, wherever these are."""

    @torch.inference_mode()
    def features(clips: Tensor) -> Tensor:
        return network.features(clips.to(network.device))

    return features


@dataclasses.dataclass(frozen=True)
class Extracted:
    """What came of many videos. rejected: pairs of key and reason."""

    output: str
    videos: int
    clips: int
    dim: int
    rejected: list[tuple[str, str]]

    def lines(self) -> list[str]:
        """For people."""
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
    progress: Callable[[int], None] = lambda done: None,
) -> Extracted:
    """Write the features of many videos to an .npz (path or URL), whole or not at all.

    progress: called with the number of videos that are done.

    Raises: DecodeError if not one of them can be used; ConfigError, ShardError, StorageError.
    """
    looked = look_at_all(
        videos,
        network.card,
        views(network.card, step),
        features_of(network),
        batch_size=batch_size,
        threads=threads,
        progress=progress,
    )
    storage.write_bytes(output, to_npz(looked))
    clips, dim = sum(len(video.outputs) for video in looked.seen), looked.seen[0].outputs.shape[1]
    return Extracted(output, len(looked.seen), clips, dim, looked.rejected)


def to_npz(looked: Looked) -> bytes:
    """The .npz of the module's head."""
    seen, rejected = looked.seen, looked.rejected
    counts = [len(video.outputs) for video in seen]
    file = io.BytesIO()
    np.savez(
        file,
        keys=np.array([video.key for video in seen]),
        fps=np.array([video.info.fps for video in seen]),
        num_frames=np.array([video.info.num_frames for video in seen]),
        labels=np.array([json.dumps(video.info.labels) for video in seen]),
        features=np.concatenate([video.outputs for video in seen]),
        starts=np.concatenate([np.array(list(video.views.starts)) for video in seen]),
        videos=np.repeat(np.arange(len(seen)), counts),
        rejected=np.array([key for key, _ in rejected], dtype=str),
        reasons=np.array([reason for _, reason in rejected], dtype=str),
    )
    return file.getvalue()
