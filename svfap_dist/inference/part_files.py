"""The Parquet file of a part: a row per clip or video, and a summary in its footer.

The columns and the names of the metadata are at the top of `extract_parts`. The summary is read
from a file's last bytes, so an extraction of thousands of parts can say what it has, and which of
its videos have changed since, without reading features.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate.runner import ViewedVideo
from svfap_dist.inference.card import without_locations
from svfap_dist.model.weights import ModelInfo

_REJECTED, _PART = b"svfap.rejected", b"svfap.part"
_NETWORK, _OPTIONS = b"svfap.network", b"svfap.options"
_TAIL_BYTES = 64 << 10  # has the footer of most files
_END_BYTES = 8  # length of the footer, and Parquet's mark


@dataclasses.dataclass(frozen=True)
class PartSummary:
    """What a part's file has.

    Attributes:
        videos: that were used.
        clips: of them.
        rejected: pairs of key and reason of the other videos.
        sizes: of the part's files in bytes, when they were listed; None: there was none.
    """

    videos: int
    clips: int
    rejected: tuple[tuple[str, str], ...]
    sizes: tuple[int | None, ...] = ()


def to_parquet(
    summary: PartSummary,
    viewed: Sequence[ViewedVideo],
    source: str,
    info: ModelInfo,
    dim: int,
    options: Mapping[str, Any],
) -> bytes:
    """Return the file of a part.

    Args:
        summary: of the videos.
        viewed: videos that were used.
        source: URL of the set of shards that has the videos; empty: they are files.
        info: of the network.
        dim: features of a clip.
        options: of the extraction: `pooled`, whether a video's clips are averaged, and others.
    """
    import pyarrow as pa
    from pyarrow import parquet

    pooled = options["pooled"]
    rows = [row for video in viewed for row in _rows(video, info.window, pooled)]
    features = np.array([row[-1] for row in rows], np.float32).reshape(-1)
    columns = {
        "source": pa.array([_text(source)] * len(rows), pa.string()),
        "key": pa.array([row[0] for row in rows], pa.string()),
        "start": pa.array([row[1] for row in rows], pa.int32()),
        "clips": pa.array([row[2] for row in rows], pa.int32()),
        "start_seconds": pa.array([row[3] for row in rows], pa.float64()),
        "end_seconds": pa.array([row[4] for row in rows], pa.float64()),
        "labels": pa.array([row[5] for row in rows], pa.string()),
        "features": pa.FixedSizeListArray.from_arrays(pa.array(features), dim),
    }
    part = {"videos": summary.videos, "clips": summary.clips, "sizes": summary.sizes}
    rejected = [[_text(key), _text(reason)] for key, reason in summary.rejected]
    metadata = {
        _REJECTED: json.dumps(rejected),
        _PART: json.dumps(part),
        _NETWORK: json.dumps(json.loads(without_locations(info).to_json(""))),  # on one line
        _OPTIONS: json.dumps(options),
    }
    table = pa.table(columns).replace_schema_metadata(metadata)
    file = io.BytesIO()
    parquet.write_table(table, file, row_group_size=max(len(rows), 1), compression="zstd")
    return file.getvalue()


def _rows(video: ViewedVideo, window: int, pooled: bool) -> Iterator[tuple[Any, ...]]:
    """Yield key, start, clips, start and end in seconds, labels and features of each row."""
    info = video.info
    key, labels = _text(video.key), json.dumps(info.labels)
    starts = list(video.views.starts)
    if pooled:
        yield key, 0, len(starts), 0.0, info.num_frames / info.fps, labels, video.mean
        return
    for start, features in zip(starts, video.outputs, strict=True):
        end = min(start + window, info.num_frames)
        yield key, start, 1, start / info.fps, end / info.fps, labels, features


def _text(name: str) -> str:
    """Return a name that Parquet can hold: bytes that are not UTF-8 become escapes."""
    return name.encode(errors="backslashreplace").decode()


def read_summary(url: str, size: int) -> PartSummary:
    """Return what a part's file has, from its footer.

    Args:
        url: of the file.
        size: its bytes.

    Raises:
        ConfigError: It is no such file.
        StorageError: The store fails.
    """
    import pyarrow as pa
    from pyarrow import parquet

    tail = storage.read_range(url, max(size - _TAIL_BYTES, 0), size)
    length = int.from_bytes(tail[-_END_BYTES:][:4], "little") + _END_BYTES
    if len(tail) < length <= size:
        tail = storage.read_range(url, size - length, size)
    try:
        metadata = parquet.read_schema(pa.BufferReader(tail)).metadata
        part, rejected = json.loads(metadata[_PART]), json.loads(metadata[_REJECTED])
        pairs = tuple((key, reason) for key, reason in rejected)
        return PartSummary(part["videos"], part["clips"], pairs, tuple(part["sizes"]))
    except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "Not a file of this extraction",
            where=url,
            found="no summary of a part in its footer",
            do="delete it and run the same command again, or give another -o",
        ) from error
