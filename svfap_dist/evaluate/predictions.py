"""What the network said of each test sample of a fold, and the file that keeps it.

`predictions.jsonl` has a row per sample: its key, what is true, and the scores, averaged over the
clips that were cut from it. From these files alone every figure of a result can be computed again.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from svfap_dist import storage
from svfap_dist.config import TaskConfig
from svfap_dist.errors import CheckpointError, HealthError

_EXAMPLES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """Samples that were tested, in parallel.

    keys: of the samples. labels: class indices [N], or values [N, K]. scores: [N, C] of the
    classes, the highest being the one said, or [N, K].
    Raises: CheckpointError if these are not parallel or a sample is twice among them; HealthError
    for scores that are no finite numbers.
    """

    keys: tuple[str, ...]
    labels: np.ndarray
    scores: np.ndarray

    def __post_init__(self) -> None:
        if not self.keys or not len(self.keys) == len(self.labels) == len(self.scores):
            lengths = f"{len(self.keys)} keys, {len(self.labels)} labels, {len(self.scores)} scores"
            raise _unusable(lengths)
        twice = [key for key, times in collections.Counter(self.keys).items() if times > 1]
        if twice:
            raise _unusable(f"{len(twice)} samples twice, such as {', '.join(twice[:_EXAMPLES])}")
        infinite = ~np.isfinite(self.scores.reshape(len(self.keys), -1)).all(axis=1)
        if infinite.any():
            raise HealthError(
                "Scores are no finite numbers",
                where=f"sample {self.keys[int(np.argmax(infinite))]}",
                found=f"{infinite.sum()} of {len(self.keys)} samples",
                do="train again with a lower optim.lr, or with train.dtype = float32",
            )

    @classmethod
    def joined(cls, parts: Sequence[Predictions]) -> Predictions:
        """The samples of all parts.

        Raises: CheckpointError if two parts have a sample in common.
        """
        keys = tuple(key for part in parts for key in part.keys)
        labels, scores = ([getattr(part, name) for part in parts] for name in ("labels", "scores"))
        return cls(keys, np.concatenate(labels), np.concatenate(scores))

    def predicted(self) -> np.ndarray:
        """The class that was said of each sample, [N]."""
        return self.scores.argmax(axis=1)

    def check_fits(self, task: TaskConfig, where: str) -> None:
        """Check shapes and classes against the task.

        Raises: CheckpointError if they are another task's.
        """
        shape, width = self.labels.shape, len(task.names)
        if self.scores.shape != (len(self.keys), width):
            raise _unusable(f"scores {list(self.scores.shape)} for {width} of task.names", where)
        if task.kind == "regression" and shape != self.scores.shape:
            raise _unusable(f"labels {list(shape)} for {width} of task.names", where)
        if task.kind == "classification":
            whole = len(shape) == 1 and np.issubdtype(self.labels.dtype, np.integer)
            if not whole or self.labels.min() < 0 or self.labels.max() >= width:
                raise _unusable(f"labels that are not classes 0 to {width - 1}", where)

    def write(self, url: str) -> None:
        """Write `predictions.jsonl`, or whatever the URL names."""
        rows = zip(self.keys, self.labels.tolist(), self.scores, strict=True)
        lines = (
            # float32's shortest digits, which read back as the same number
            json.dumps({"key": key, "label": label, "scores": [float(str(s)) for s in scores]})
            for key, label, scores in rows
        )
        storage.write_bytes(url, "".join(f"{line}\n" for line in lines).encode())

    @classmethod
    def read(cls, url: str) -> Predictions:
        """Read what `write` wrote.

        Raises: CheckpointError if it is missing or damaged; StorageError.
        """
        try:
            rows = [json.loads(line) for line in storage.read_bytes(url).splitlines()]
            labels = np.array([row["label"] for row in rows])
            scores = np.array([row["scores"] for row in rows], np.float32)
            keys = tuple(row["key"] for row in rows)
        except storage.StorageMissingError as error:
            raise _unusable("no such file", url) from error
        except (ValueError, KeyError, TypeError) as error:
            raise _unusable(repr(error), url) from error
        if np.issubdtype(labels.dtype, np.floating):
            labels = labels.astype(np.float32)
        return cls(keys, labels, scores)


def _unusable(found: str, where: str = "") -> CheckpointError:
    return CheckpointError(
        "Predictions cannot be used", where=where, found=found, do="evaluate this fold again"
    )
