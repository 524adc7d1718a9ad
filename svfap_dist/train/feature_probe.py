"""Probes while it trains: features of the frozen encoder by all ranks, scored on rank 0.

In: the network after some steps, and the labeled clips of `probe.url`. Out: UAR of kNN and logistic
regression (`evaluate.feature_probe`), an event, metrics, and the mark of the best checkpoint. Clips
are read and decoded again each time, by the loop that validates and tests (`evaluate.runner`), each
rank an equal part; nothing is drawn at random and no weight changes, so a run with probes computes
the same bits as one without.

A probe that fails costs no step. All ranks learn of a failure on one at the next exchange and leave
together, since their collectives must stay in the same order.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor, nn

from svfap_dist import distributed
from svfap_dist.checkpoint.best import BestCheckpoint, read_best
from svfap_dist.config import Config, ProbeConfig
from svfap_dist.distributed import World
from svfap_dist.errors import SvfapError
from svfap_dist.evaluate import feature_probe
from svfap_dist.evaluate.feature_probe import ProbeScores, ProbeSet
from svfap_dist.evaluate.runner import (
    Decoding,
    LockstepFunction,
    StoppedError,
    ViewedVideo,
    view_videos,
)
from svfap_dist.model import pooling
from svfap_dist.model.pooling import Pool, build_pool
from svfap_dist.model.sizes import size_of_build
from svfap_dist.shards.reader import SampleReader
from svfap_dist.telemetry import activity
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train.engine import Engine
from svfap_dist.train.objective import build_arguments
from svfap_dist.video.info import segment_views

_EPSILON = 1e-6  # of the LayerNorm before a head

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Features:
    """Features of one rank. rows: of the probe set; error: "" if all were computed."""

    rows: list[int]
    features: list[np.ndarray]
    error: str = ""
    is_stopped: bool = False


@dataclasses.dataclass(frozen=True)
class _Outcome:
    """The result of a probe on all ranks. error: "" if there are scores."""

    scores: ProbeScores | None
    clips: int
    seconds: float  # of reading, decoding and the network
    score_seconds: float
    error: str = ""


class FeatureProbe:
    """The probe of a run, on one rank; `run` is called by all ranks together.

    Args:
        config: The recipe; it has a probe.url.
        world: This rank's place among all ranks.
        probe_set: The samples.
        recorder: Records scores and failures.

    Raises:
        StorageError: On every rank, if rank 0 cannot read which checkpoint is the best.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        probe_set: ProbeSet,
        recorder: Recorder,
    ) -> None:
        self._config, self._world, self._set, self._recorder = config, world, probe_set, recorder
        self._rows = np.array_split(np.arange(len(probe_set.indices)), world.world_size)[world.rank]
        probe = config.probe
        self._region = probe.region or config.data.region
        self._pool = probe_pool(config)
        of_set = f"{probe_set.manifest.fingerprint} {probe.label} {probe.max_clips}"
        pool = "".join(f" {name}={value}" for name, value in _pool_arguments(probe).items())
        self._identity = f"{of_set} {self._region}{pool}"
        best = distributed.run_on_main(lambda: read_best(config.run.url))
        self._best = best if best is not None and best.measured_by == self._identity else None
        # What had better features than the best committed checkpoint when probed, by step.
        self._candidates: dict[int, BestCheckpoint] = {}

    def run(self, engine: Engine, step: int, stops: Callable[[], bool]) -> bool:
        """Score and record the features; return whether no committed checkpoint has better ones.

        Args:
            engine: Engine of the run.
            step: Completed optimizer steps.
            stops: Returns whether this rank received notice to stop, which ends the probe.
        """
        began = time.perf_counter()
        activity.begin("probing", step, is_slow=True)
        try:
            mine = self._features(engine, step, stops)
            parts: list[_Features] = distributed.all_gather_object(mine)
            if any(part.is_stopped for part in parts) and not any(part.error for part in parts):
                return False
            outcome = self._scored(parts, began)
            self._record(step, outcome)
            return self._is_best(step, outcome)
        finally:
            self._recorder.add_probe_seconds(time.perf_counter() - began)

    def _features(self, engine: Engine, step: int, stops: Callable[[], bool]) -> _Features:
        """Compute this rank's features, in lockstep with all ranks."""
        config, error = self._config, ""
        pool = self._pool.to(engine.device)

        def must_stop() -> bool:  # between two batches
            activity.begin("probing", step, is_slow=True)
            return bool(error) or stops()

        def compute(clips: Tensor) -> Tensor:
            return clip_features(engine.eager_network, clips.to(engine.device), pool)

        lockstep = LockstepFunction(compute, config.data, must_stop)
        found = _Features([], [])
        try:
            with engine.evaluating():
                try:
                    self._view(lockstep, found)
                except StoppedError:
                    raise
                except Exception as failure:
                    # Inside a network at ZeRO-3 the other ranks wait in its collectives.
                    if config.train.zero_stage == 3 and not isinstance(failure, SvfapError):
                        raise
                    error = f"rank {self._world.rank}: {type(failure).__name__}: {failure}"
                lockstep.finish()
        except StoppedError:
            return dataclasses.replace(found, error=error, is_stopped=True)
        return dataclasses.replace(found, error=error)

    def _view(self, lockstep: LockstepFunction, found: _Features) -> None:
        config, probe = self._config, self._config.probe
        reader = SampleReader(probe.url, self._set.manifest)
        videos = view_videos(
            [functools.partial(reader.read, int(self._set.indices[row])) for row in self._rows],
            config.data,
            segment_views(config.data, self._region, segments=1, crops=1),
            lockstep,
            batch_size=config.train.micro_batch_size,
            decoding=Decoding.of(config.data, config.decode.backend),
        )
        with contextlib.closing(videos):
            for row, video in zip(self._rows.tolist(), videos, strict=True):
                if isinstance(video, ViewedVideo):
                    found.rows.append(row)
                    found.features.append(video.mean)

    def _scored(self, parts: list[_Features], began: float) -> _Outcome:
        """Score the features on rank 0, while the other ranks wait, and broadcast the outcome."""
        rows = [row for part in parts for row in part.rows]
        seconds = time.perf_counter() - began
        errors = [part.error for part in parts if part.error]
        if not rows:
            errors.append("no sample can be read; run `svfap shards verify` on probe.url")
        if errors:
            return _Outcome(None, len(rows), seconds, 0.0, errors[0])

        def score() -> _Outcome | None:
            if not self._world.is_main:
                return None
            began_to_score = time.perf_counter()
            features = np.stack([feature for part in parts for feature in part.features])
            targets, folds = self._set.targets[rows], self._set.folds[rows]
            neighbors = self._config.probe.neighbors
            try:
                scores, error = feature_probe.score(features, targets, folds, neighbors), ""
            except Exception as failure:
                scores, error = None, f"{type(failure).__name__}: {failure}"
            score_seconds = time.perf_counter() - began_to_score
            return _Outcome(scores, len(rows), seconds, score_seconds, error)

        return distributed.broadcast_object(distributed.run_long_on_all_ranks(score))

    def _record(self, step: int, outcome: _Outcome) -> None:
        if outcome.scores is None:
            self._recorder.record_probe_failure(step, outcome.error)
            if self._world.is_main:
                log.warning("The probe after step %d failed: %s", step, outcome.error)
            return
        fields: dict[str, Any] = {
            "clips": outcome.clips,
            "bad_clips": len(self._set.indices) - outcome.clips,
            "classes": self._set.num_classes,
            "split_by": self._set.grouped_by,
            "feature_seconds": outcome.seconds,
            "score_seconds": outcome.score_seconds,
        }
        self._recorder.record_probe(step, dataclasses.asdict(outcome.scores), **fields)

    def _is_best(self, step: int, outcome: _Outcome) -> bool:
        """Return the same on all ranks; the network before the first step never is the best."""
        if outcome.scores is None or step == 0:
            return False
        uar = outcome.scores.logistic
        if self._best is not None and uar <= self._best.score:
            return False
        self._candidates[step] = BestCheckpoint(step, uar, self._identity)
        return True

    def candidate(self, step: int) -> BestCheckpoint | None:
        """Return the mark of the checkpoint after a step, if it is the best once it is committed.

        Args:
            step: Completed optimizer steps.
        """
        found = self._candidates.get(step)
        is_best = found is not None and (self._best is None or found.score > self._best.score)
        return found if is_best else None

    def confirm(self, step: int) -> None:
        """Take a checkpoint as the best, now that it is committed and marked.

        Args:
            step: Its completed optimizer steps, for which there was a `candidate`.
        """
        self._best = self._candidates[step]
        self._candidates = {n: found for n, found in self._candidates.items() if n > step}


def probe_pool(config: Config) -> Pool:
    """Return what makes features of the encoder's tokens.

    Args:
        config: The recipe of a pre-training.

    Raises:
        ConfigError: If its grid is finer than the patches.
    """
    return build_pool(size_of_build(build_arguments(config)), **_pool_arguments(config.probe))


def _pool_arguments(probe: ProbeConfig) -> dict[str, Any]:
    return pooling.arguments(probe.pool, probe.stages, probe.grid)


def clip_features(network: Callable[..., Any], clips: Tensor, pool: Pool) -> Tensor:
    """Return features [B, V*D] of an autoencoder's encoder, as `inference.load.Network` does.

    Args:
        network: An autoencoder; called without indices it masks nothing.
        clips: uint8 [B, F, H, W, 3], where the network is.
        pool: From `probe_pool`, where the network is.
    """
    vectors = pool([tokens.float() for tokens in pool.chosen(network(clips))])
    return nn.functional.layer_norm(vectors, vectors.shape[-1:], eps=_EPSILON).flatten(1)
