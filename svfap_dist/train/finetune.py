"""Fine-tuning on a task: a run per fold of its protocol, then one result.

Each fold is an ordinary run in a folder of its own, `fold-1/`, ..., below `run.url` (a task with a
fixed split is one run, in `run.url` itself). So the same command started again leaves finished
folds alone, resumes the one that was cut short, and goes on. Notice to stop and `train.max_seconds`
are for all of it; a test that has begun is stopped by the former only. `results.json` and the
confusion matrix (`pictures/confusion.png`) come last, from the predictions of all folds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, TaskConfig
from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.evaluate import protocol
from svfap_dist.evaluate.predictions import Predictions
from svfap_dist.evaluate.results import Results, summarise
from svfap_dist.telemetry.journal import read_recipe
from svfap_dist.train import loop
from svfap_dist.train.attempt import RunContext, RunResult
from svfap_dist.train.signals import FINISHED
from svfap_dist.train.testing import PREDICTIONS

RESULTS, CONFUSION = "results.json", "pictures/confusion.png"

Fold = int  # from 1; 0: the task has a fixed split


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """How it ended. stop_reason: "finished", or what asked the run of a fold to stop; `results` is
    None then."""

    run_url: str
    stop_reason: str
    results: Results | None
    step: int = 0  # of the fold that was stopped
    fold: Fold = 0

    def lines(self) -> list[str]:
        """For people."""
        if self.results is None:
            which = f"Fold {self.fold} of {self.run_url}" if self.fold else f"Run {self.run_url}"
            said = f"{which}: {self.stop_reason} at step {self.step}."
            return [said, "A checkpoint is saved: run the same command again to resume."]
        return [*self.results.lines(), f"Results: {storage.join(self.run_url, RESULTS)}"]


def task_of(config: Config) -> TaskConfig:
    """The recipe's task. Raises: ConfigError if it has none."""
    if config.task is None:
        raise ConfigError(
            "Recipe has no task to fine-tune on",
            where="[task]",
            found="a recipe of pre-training",
            do="use `svfap pretrain`, or one of the finetune_... recipes",
        )
    return config.task


def runs_of(config: Config) -> dict[Fold, Config]:
    """The recipe of each fold's run, in order.

    Raises: ConfigError if there is no task.
    """
    task = task_of(config)
    if not task.folds:
        return {0: config}
    return {fold: _of_fold(config, task, fold) for fold in protocol.folds_of(task)}


def _of_fold(config: Config, task: TaskConfig, fold: Fold) -> Config:
    run = config.run
    return config.model_copy(
        update={
            "task": task.model_copy(update={"fold": fold}),
            "run": run.model_copy(
                update={
                    "url": storage.join(run.url, f"fold-{fold}"),
                    "name": f"{run.name}-fold-{fold}",
                }
            ),
        }
    )


def run(
    config: Config,
    train: Callable[[Config, RunContext], RunResult],
    on_fold: Callable[[Fold, int], None] = lambda fold, step: None,
    on_tested: Callable[[Fold, Results], None] = lambda fold, results: None,
    *,
    writes: bool = True,
) -> FinetuneResult:
    """Train and test every fold by `train`, and sum up.

    Args:
        train: trains a run to its end, from the facts that were read before, and has its test
            samples' predictions written.
        on_fold: told of each fold that is to be trained, and the step it goes on from.
        on_tested: told of each fold that was trained, and its own results, where `writes`.
        writes: whether this process writes the results; one of the ranks does.

    Raises: what `train` raises; ConfigError, ShardError before anything starts.
    """
    task, folds, began = task_of(config), runs_of(config), time.monotonic()
    contexts = {fold: loop.preflight(one) for fold, one in folds.items()}
    tested = {fold for fold, one in folds.items() if _is_tested(one)}
    for fold, one in folds.items():
        if fold in tested:
            continue
        # Minutes or hours later, another process may have saved a checkpoint of this fold.
        context = loop.preflight(one, contexts[fold])
        on_fold(fold, context.step)
        ended = train(_with_time_left(one, time.monotonic() - began), context)
        if ended.stop_reason != FINISHED:
            return FinetuneResult(config.run.url, ended.stop_reason, None, ended.step, fold)
        if writes:  # alone: a rank that could not read it would leave the others in the next fold
            with contextlib.suppress(StorageError):
                on_tested(fold, summarise(task, {fold: _predictions(one)}))
    results = summarise(task, {fold: _predictions(one) for fold, one in folds.items()})
    if writes:
        write(results, config.run.url)
    return FinetuneResult(config.run.url, FINISHED, results)


def _predictions(config: Config) -> Predictions:
    return Predictions.read(storage.join(config.run.url, PREDICTIONS))


def _is_tested(config: Config) -> bool:
    """Whether a fold has predictions. Raises: ConfigError if they were made of other clips."""
    if not storage.exists(storage.join(config.run.url, PREDICTIONS)):
        return False
    then, now = read_recipe(config.run.url).finetune, config.finetune
    for name in ("test_segments", "test_crops"):
        if getattr(then, name) != getattr(now, name):
            raise ConfigError(
                "Already tested in another way",
                where=f"finetune.{name}",
                found=f"{getattr(now, name)}, but {config.run.url} was tested with "
                f"{getattr(then, name)}",
                do="set it back, and test again with `svfap evaluate`, which takes other values",
            )
    return True


def _with_time_left(config: Config, spent: float) -> Config:
    """The recipe of a fold that begins when so many of train.max_seconds are spent."""
    limit = config.train.max_seconds
    if not limit:
        return config
    train = config.train.model_copy(update={"max_seconds": max(math.ceil(limit - spent), 1)})
    return config.model_copy(update={"train": train})


def write(results: Results, url: str) -> None:
    """Write results.json, and the picture of a classification, below `url`."""
    storage.write_bytes(storage.join(url, RESULTS), results.to_json().encode())
    if results.confusion is not None:
        storage.write_bytes(storage.join(url, CONFUSION), results.picture())


def found(config: Config, url: str) -> Mapping[Fold, str]:
    """Where the weights of each fold of the recipe's task are, in a fine-tuning's folder, or of the
    only one there is.

    Raises: ConfigError, CheckpointError.
    """

    def of(fold: Fold) -> str:
        return storage.join(url, f"fold-{fold}") if fold else url

    folds = protocol.folds_of(task_of(config))
    if any(storage.list_files(storage.join(of(fold), "checkpoints")) for fold in folds):
        return {fold: of(fold) for fold in folds}
    _, theirs = load.locate_weights(url)  # a fold's run, or one of its checkpoints
    return {theirs.task.fold if theirs.task else 0: url}
