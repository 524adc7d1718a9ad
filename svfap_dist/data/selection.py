"""The samples of a labeled set that a run uses, and their targets.

In: the labels that sharding wrote into the shards' indexes, which are small: no tar is read. Out: a
`Selection`, which `evaluate.protocol` makes of them: it chooses the samples of a fold and converts
labels to a task's targets. The loader takes selections and does not know protocols.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from svfap_dist import storage
from svfap_dist.errors import ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest, ShardEntry

_THREADS = 16  # that wait for the store


@dataclasses.dataclass(frozen=True, eq=False)
class Selection:
    """Samples of a data set and their targets.

    Args:
        indices: int64 [N], global indices (over the shards in manifest order), ascending.
        targets: int64 [N] (classes) or float32 [N, K] (values).

    Raises:
        ValueError: They have other forms, so targets could belong to other samples.
    """

    indices: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        dimensions = {"int64": 1, "float32": 2}.get(self.targets.dtype.name)
        if self.indices.dtype != np.int64 or self.indices.ndim != 1:
            raise ValueError("indices must be int64 [N]")
        if self.targets.ndim != dimensions or len(self.targets) != len(self.indices):
            raise ValueError("targets must be int64 [N] or float32 [N, K], one row per index")
        if len(self) and (self.indices[0] < 0 or (np.diff(self.indices) <= 0).any()):
            raise ValueError("indices must be at least 0, ascending and distinct")

    def __len__(self) -> int:
        return len(self.indices)

    def targets_of(self, samples: Sequence[int]) -> np.ndarray:
        """Return targets [B] or [B, K].

        Args:
            samples: Global indices of B samples of the selection.
        """
        rows = np.searchsorted(self.indices, samples)
        assert (self.indices[rows] == samples).all(), "samples outside the selection"
        return self.targets[rows]


def find_label(row: Mapping[str, Any], path: str) -> Any:
    """Return the value of a column of a sample's labels, or None.

    Args:
        row: The sample's labels.
        path: The column, or one of its entries: "class", "classes.arousal".
    """
    found: Any = row
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def labels_of(url: str, manifest: Manifest) -> Sequence[dict[str, Any]]:
    """Return the labels of all samples (`data_sharding.sources.Labels`, as columns), in order.

    Those of the last data set are cached: every fold of a fine-tuning needs them again.

    Args:
        url: Folder or prefix of the shards.
        manifest: The data set.

    Raises:
        ShardError, StorageError: The shards have no labels, or an index is not the manifest's.
    """
    return _labels_of_shards(url, manifest.shards)


@functools.lru_cache(maxsize=1)  # by the digests of the indexes
def _labels_of_shards(url: str, shards: tuple[ShardEntry, ...]) -> Sequence[dict[str, Any]]:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="labels") as pool:
        found = pool.map(lambda entry: _labels_of_shard(url, entry), shards)
        return tuple(labels for of_shard in found for labels in of_shard)


def _labels_of_shard(url: str, entry: ShardEntry) -> tuple[dict[str, Any], ...]:
    index = shard_format.load_index(url, entry)
    if len(index.labels) != entry.num_samples:
        where = storage.join(url, entry.index_name)
        found = f"labels of {len(index.labels)} of {entry.num_samples} samples"
        do = "shard again with a labeled source"
        raise ShardError("Shards have no labels", where, found, do)
    return index.labels
