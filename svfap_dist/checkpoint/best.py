"""The best checkpoint of a run by its probes or by validation: checkpoints/best.json.

In: the step of a checkpoint and its score. Out: which committed checkpoint is best. Rank 0 writes
the file after the checkpoint's COMMIT; retention and `svfap checkpoint gc` keep that checkpoint.
`checkpoints/best` below a run is accepted wherever the URL of a checkpoint is.
"""

from __future__ import annotations

import dataclasses
import json

from svfap_dist import storage
from svfap_dist.checkpoint import store
from svfap_dist.errors import CheckpointError

BEST = "best.json"
_ALIAS = "checkpoints/best"


@dataclasses.dataclass(frozen=True)
class BestCheckpoint:
    """A checkpoint and why it is the best.

    Attributes:
        step: Its completed optimizer steps.
        score: UAR of logistic regression on its features, or that of the validation samples of a
            fine-tuning, from 0 to 1; or the CCC of these.
        measured_by: Identity of the probe or validation: scores of others are not comparable.
        metric: Name of the score.
    """

    step: int
    score: float
    measured_by: str
    metric: str = "uar"

    @property
    def score_text(self) -> str:
        """The score as tables show it."""
        if self.metric == "uar":
            return f"UAR {100 * self.score:.1f} %"
        return f"{self.metric.upper()} {self.score:.3f}"

    @property
    def judged_by(self) -> str:
        """What marked it as the best, for tables: probes or validation."""
        return "validation" if self.measured_by.startswith("validation ") else "probes"


def read_best(run_url: str) -> BestCheckpoint | None:
    """Return the best checkpoint of a run; None if none is marked, or it has been deleted.

    Args:
        run_url: URL of the run.

    Raises:
        StorageError: If the store fails.
    """
    try:
        found = json.loads(storage.read_bytes(_where(run_url)))
        metric = str(found.get("metric", "uar"))
        score, by = float(found[metric]), str(found["probe"])
        best = BestCheckpoint(int(found["step"]), score, by, metric)
    except (storage.StorageMissingError, ValueError, LookupError, TypeError):
        return None
    commit = storage.join(store.checkpoint_url(run_url, best.step), store.COMMIT)
    return best if storage.exists(commit) else None


def write_best(run_url: str, best: BestCheckpoint) -> None:
    """Mark a committed checkpoint as the best.

    Args:
        run_url: URL of the run.
        best: The checkpoint.

    Raises:
        StorageError: If the store fails.
    """
    content = {"step": best.step, best.metric: best.score, "probe": best.measured_by}
    content["metric"] = best.metric
    storage.write_bytes(_where(run_url), json.dumps(content).encode())


def resolve_best(url: str) -> str:
    """Return the URL of the best checkpoint for RUN/checkpoints/best; any other URL as it is.

    Args:
        url: Of a run or of one of its checkpoints.

    Raises:
        CheckpointError: If no checkpoint of the run is marked.
    """
    run_url, alias, rest = url.rstrip("/").rpartition(_ALIAS)
    if not alias or rest or not run_url.endswith("/"):
        return url
    run_url = run_url.rstrip("/")
    best = read_best(run_url)
    if best is None:
        found = f"no {BEST}, or its checkpoint has been deleted"
        advice = "give checkpoints/step-..., or the run for its newest; [probe] of a recipe of "
        advice += "pre-training and finetune.validation mark the best"
        raise CheckpointError("No best checkpoint", url, found, advice)
    return store.checkpoint_url(run_url, best.step)


def _where(run_url: str) -> str:
    return storage.join(run_url, "checkpoints", BEST)
