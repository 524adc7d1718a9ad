"""The best checkpoint of a run by its probes: checkpoints/best.json.

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
        uar: UAR of logistic regression on its features, from 0 to 1.
        probe: Identity of the probe: only scores of the same one are comparable.
    """

    step: int
    uar: float
    probe: str


def read_best(run_url: str) -> BestCheckpoint | None:
    """Return the best checkpoint of a run; None without probes, or if it has been deleted.

    Args:
        run_url: URL of the run.

    Raises:
        StorageError: If the store fails.
    """
    try:
        found = json.loads(storage.read_bytes(_where(run_url)))
        best = BestCheckpoint(int(found["step"]), float(found["uar"]), str(found["probe"]))
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
    storage.write_bytes(_where(run_url), json.dumps(dataclasses.asdict(best)).encode())


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
        advice += "pre-training marks the best"
        raise CheckpointError("No best checkpoint", url, found, advice)
    return store.checkpoint_url(run_url, best.step)


def _where(run_url: str) -> str:
    return storage.join(run_url, "checkpoints", BEST)
