"""The context of a run: manifest, split of a task, history, and state of the newest checkpoint.

It is read and checked once, by the process that starts the ranks, and sent to them.
"""

from __future__ import annotations

import dataclasses
import logging

from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config
from svfap_dist.data import decoding
from svfap_dist.errors import SvfapError
from svfap_dist.evaluate import feature_probe, protocol
from svfap_dist.evaluate.feature_probe import ProbeSet
from svfap_dist.evaluate.protocol import TaskSplit
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import open_training_data
from svfap_dist.shards.reader import open_data
from svfap_dist.telemetry.journal import RunHistory, read_history
from svfap_dist.train.feature_probe import probe_pool

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Facts about a run that are read once, before its ranks start; picklable."""

    manifest: Manifest
    split: TaskSplit | None  # training and test samples of a task; None: pre-training
    state: TrainState | None  # of the newest checkpoint; None: a new run
    history: RunHistory
    eval_manifest: Manifest | None = None  # of data.eval_url
    probe_set: ProbeSet | None = None  # of probe.url
    probe_error: str = ""  # why a run that resumes has no probes

    @property
    def attempt(self) -> int:
        """Return the number of the attempt, from 1."""
        return self.history.attempts + 1

    @property
    def step(self) -> int:
        """Return the number of completed optimizer steps."""
        return self.state.step if self.state else 0


def load_run_context(config: Config, known: RunContext | None = None) -> RunContext:
    """Read and check the manifest, the split of a task and the newest checkpoint.

    Args:
        config: The run's recipe.
        known: Earlier context of the run; only newest checkpoint and history are read again.

    Raises:
        ConfigError: If recipe, data and checkpoint do not fit each other.
        ShardError: If the manifest cannot be used.
        CheckpointError: If the newest checkpoint's state cannot be read.
    """
    run_url, state = config.run.url, None
    step, history = store.latest_committed(run_url), read_history(run_url)
    if step is not None:
        state = store.read_state(run_url, step)
    if known is None:
        trusted = {*history.fingerprints, *([state.manifest_fingerprint] if state else [])}
        manifest = open_training_data(config, trusted)
        decoding.check_backend(config, config.data.url, manifest)
        eval_url, task = config.data.eval_url, config.task
        eval_manifest = open_data(config, eval_url, trusted) if eval_url else None
        split = protocol.split_samples(config, manifest, task.fold) if task else None
        probe_set, probe_error = _open_probe_set(config, is_new=state is None)
    else:
        manifest, eval_manifest, split = known.manifest, known.eval_manifest, known.split
        probe_set, probe_error = known.probe_set, known.probe_error
    if state is not None:
        where = store.checkpoint_url(run_url, state.step)
        state.check_resumable(config, manifest.fingerprint, where)
    return RunContext(manifest, split, state, history, eval_manifest, probe_set, probe_error)


def _open_probe_set(config: Config, is_new: bool) -> tuple[ProbeSet | None, str]:
    """Return the samples of probes, or the error, which only a new run raises."""
    if not config.probe.url:
        return None, ""
    try:
        probe_pool(config)  # refuses a grid that is too fine
        return feature_probe.open_probe_set(config.probe), ""
    except SvfapError as error:
        if is_new:
            raise
        log.warning("The run resumes without probes: %s", error)
        return None, str(error)
