"""Validation of a fine-tuning: which epoch is the best, and when to stop.

In: the network after each epoch, and the validation samples that `evaluate.protocol` holds out of
the training side of a fold. Out: their score, an event, the mark of the best checkpoint, and
whether `finetune.patience` epochs in a row were no better. Test samples are never among them.

The only state is the mark, checkpoints/best.json: the steps since then say how many epochs were no
better. An attempt that resumes from an epoch's checkpoint without the mark validates again, since
the run may have been stopped in the validation or killed before the mark. Nothing is drawn at
random, so training is not changed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np
from torch import Tensor

from svfap_dist import distributed, storage
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.best import BestCheckpoint, read_best, write_best
from svfap_dist.config import Config
from svfap_dist.data.selection import Selection
from svfap_dist.distributed import World
from svfap_dist.evaluate import runner
from svfap_dist.evaluate.metrics import SCORE_FUNCTIONS
from svfap_dist.evaluate.protocol import require_task
from svfap_dist.evaluate.results import Predictions
from svfap_dist.model import weights
from svfap_dist.shards.format import Manifest
from svfap_dist.telemetry import activity
from svfap_dist.telemetry.recorder import Recorder
from svfap_dist.train.engine import Engine

METRICS = {"classification": "uar", "regression": "ccc"}

log = logging.getLogger(__name__)


class EarlyStop:
    """Scores of the validation samples of one run; all methods are called by all ranks together.

    Args:
        config: The recipe; it has a finetune.validation.
        world: This rank's place among all ranks.
        data: The training data, and which of its samples are the validation samples.
        steps: Of an epoch, and of the run.
        recorder: Records the scores.

    Raises:
        StorageError: On every rank, if rank 0 cannot read which checkpoint is the best.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        data: tuple[Manifest, Selection],
        steps: tuple[int, int],
        recorder: Recorder,
    ) -> None:
        self._config, self._world, self._recorder = config, world, recorder
        self._manifest, self._selection = data
        self._steps_per_epoch, self._total_steps = steps
        self._metric = METRICS[require_task(config).kind]
        share = f"{config.finetune.validation:g}"
        self._identity = f"validation {share} {self._manifest.fingerprint}"
        marked = self._marked()
        self._bests = [] if marked is None else [marked]  # each better than those before it

    @property
    def best(self) -> BestCheckpoint | None:
        """The best epoch so far."""
        return self._bests[-1] if self._bests else None

    def _marked(self) -> BestCheckpoint | None:
        best = distributed.run_on_main(lambda: read_best(self._config.run.url))
        return best if best is not None and best.measured_by == self._identity else None

    def is_due(self, step: int) -> bool:
        """Return whether a step ends an epoch, or the run.

        Args:
            step: Completed optimizer steps.
        """
        return step % self._steps_per_epoch == 0 or step == self._total_steps

    def may_be_unscored(self, step: int) -> bool:
        """Return whether a restored epoch may lack its score, or its mark as the best.

        Args:
            step: Completed optimizer steps.
        """
        is_marked = self.best is not None and self.best.step == step
        return step > 0 and self.is_due(step) and not is_marked

    def is_over(self, step: int) -> bool:
        """Return whether the last epochs, as many as finetune.patience says, were no better.

        Args:
            step: Completed optimizer steps.
        """
        patience = self._config.finetune.patience * self._steps_per_epoch
        return 0 < patience <= step - (self.best.step if self.best is not None else 0)

    def run(self, engine: Engine, step: int, stops: Callable[[], bool]) -> bool:
        """Score the network; return whether it is the best so far.

        Args:
            engine: Engine of the run.
            step: Completed optimizer steps.
            stops: Returns whether this rank received notice to stop, which ends the validation.
        """
        began = time.perf_counter()

        def must_stop() -> bool:  # between two batches
            activity.begin("validating", step, is_slow=True)
            return stops()

        try:
            with engine.evaluating():
                tested = runner.score_selection(
                    self._config,
                    self._manifest,
                    self._world,
                    self._selection,
                    engine.network,
                    engine.device,
                    stops=must_stop,
                )
        except runner.StoppedError:  # the next attempt does it again
            return False
        finally:
            self._recorder.add_test_seconds(time.perf_counter() - began)
        score = _score(self._metric, tested.predictions)
        is_best = not math.isnan(score) and (self.best is None or score > self.best.score)
        if is_best:
            self._bests.append(BestCheckpoint(step, score, self._identity, self._metric))
        count, skipped = len(tested.predictions.keys), len(tested.bad)
        self._recorder.record_validation(step, self._metric, score, count, skipped, is_best)
        return is_best

    def candidate(self, step: int) -> BestCheckpoint | None:
        """Return the mark of the checkpoint after a step, if it is the best.

        Args:
            step: Completed optimizer steps.
        """
        return self.best if self.best is not None and self.best.step == step else None

    def lose(self, step: int) -> None:
        """Count an epoch no longer: its checkpoint could not be stored, so it cannot be tested.

        Args:
            step: Completed optimizer steps.
        """
        self._bests = [best for best in self._bests if best.step != step]

    def mark(self) -> None:
        """Mark the best as such, whose checkpoint is committed."""
        best = self.best
        if best is not None:
            distributed.run_on_main(lambda: write_best(self._config.run.url, best))

    def network_to_test(self, engine: Engine) -> Callable[..., Tensor]:
        """Return the network of the best epoch; the engine's if no score was a number.

        Args:
            engine: Engine of the run.
        """
        best = self._marked()  # in the store
        if best is None:
            return engine.network
        if self._world.is_main:
            log.info("Testing step %d, the best by validation: %s.", best.step, best.score_text)
        folder = store.checkpoint_url(self._config.run.url, best.step)
        path = storage.join(folder, store.WEIGHTS)
        network = distributed.run_on_all_ranks(lambda: weights.load_classifier(path))
        return network.to(engine.device)


def _score(metric: str, predictions: Predictions) -> float:
    """Return the score of all samples, or its mean over the dimensions of a regression."""
    compute, labels, scores = (
        SCORE_FUNCTIONS[metric].compute,
        predictions.labels,
        predictions.scores,
    )
    if SCORE_FUNCTIONS[metric].kind == "classification":
        return compute(labels, scores.argmax(axis=1))
    pairs = zip(labels.T, scores.T, strict=True)
    return float(np.mean([compute(label, score) for label, score in pairs]))
