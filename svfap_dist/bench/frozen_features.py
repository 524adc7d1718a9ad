"""Features of a frozen encoder for a labeled set, computed once and kept in a file.

In: the recipe of a classifier with initial weights. Out: for each sample what the head would see,
pooled and normalized, as the mean over the views of the test. The name of the file is a digest of
all that the features depend on, so other weights or another pool have a file of their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.errors import ShardError
from svfap_dist.evaluate.runner import Decoding, ViewedVideo, view_videos
from svfap_dist.model.classifier import Classifier
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import SampleReader
from svfap_dist.train.objective import build_objective
from svfap_dist.video.info import segment_views

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of features; is_there: which of the samples have one, bool."""

    rows: np.ndarray
    is_there: np.ndarray


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """Features [N, D] of samples; indices: ascending, in the data set; keys: their names."""

    indices: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def rows_of(self, samples: np.ndarray) -> Rows:
        """Return where samples are.

        Args:
            samples: indices in the data set.
        """
        rows = np.searchsorted(self.indices, samples)
        rows = np.minimum(rows, len(self.indices) - 1)
        is_there = self.indices[rows] == samples
        return Rows(rows[is_there], is_there)

    def to_bytes(self) -> bytes:
        """Return the content of their file."""
        file = io.BytesIO()
        np.savez(file, indices=self.indices, keys=self.keys, values=self.values)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> FrozenFeatures:
        """Return what `to_bytes` wrote.

        Args:
            content: of the file.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return cls(file["indices"], file["keys"], file["values"])


def load_features(
    config: Config, manifest: Manifest, device: torch.device, folder: str
) -> FrozenFeatures:
    """Return the features of all samples of the data set, from their file if they have one.

    Args:
        config: recipe of the classifier; finetune.init has its weights.
        manifest: of the data set.
        device: that computes them.
        folder: of the files.

    Raises:
        ShardError: No sample can be read.
        StorageError: The store fails.
    """
    objective, data, views = build_objective(config), config.data, config.finetune
    identity = [
        manifest.fingerprint,
        config.finetune.init,
        dict(objective.build_arguments),
        [data.num_frames, data.sampling_rate, data.frame_size, data.region],
        [views.test_segments, views.test_crops],
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    where = storage.join(folder, f"{digest}.npz")
    with contextlib.suppress(storage.StorageMissingError):
        return FrozenFeatures.from_bytes(storage.read_bytes(where))
    log.info("Computing the features of %d samples.", manifest.num_samples)
    rows = _compute(config, manifest, device)
    if not rows:
        found, do = "none", "run `svfap shards verify` on data.url"
        raise ShardError("No sample can be read", ", ".join(data.urls), found, do)
    if missing := manifest.num_samples - len(rows):
        log.warning("%d samples cannot be used and do not count.", missing)
    indices, keys, values = zip(*rows, strict=True)
    features = FrozenFeatures(np.array(indices, np.int64), np.array(keys), np.stack(values))
    storage.write_bytes(where, features.to_bytes())
    return features


def _compute(
    config: Config, manifest: Manifest, device: torch.device
) -> list[tuple[int, str, np.ndarray]]:
    """Return index, key and feature of each sample that can be read."""
    data, views = config.data, config.finetune
    model = cast(Classifier, build_objective(config).build())
    model.head = cast(Any, nn.Identity())
    model = model.to(device).eval()
    reader, samples = SampleReader(data.url, manifest), range(manifest.num_samples)
    videos = view_videos(
        [partial(reader.read, index) for index in samples],
        data,
        segment_views(data, data.region, views.test_segments, views.test_crops),
        lambda clips: model(clips.to(device)).float(),
        batch_size=config.train.micro_batch_size,
        decoding=Decoding.of(data, config.decode.backend),
    )
    with torch.no_grad(), contextlib.closing(videos):
        return [
            (index, video.key, video.mean)
            for index, video in zip(samples, videos, strict=True)
            if isinstance(video, ViewedVideo)
        ]
