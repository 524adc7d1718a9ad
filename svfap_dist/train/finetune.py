"""Fine-tuning on a task: a run per fold of its protocol, and per seed, then one result.

Each fold is an ordinary run in a folder of its own, `fold-1/`, ..., below `run.url` (a task with a
fixed split is one run, in `run.url` itself). So the same command started again skips finished
folds, resumes the interrupted one, and continues. A request to stop and `train.max_seconds` apply
to all folds together; only a request interrupts a test that has begun. `results.json` and the
confusion matrix (`pictures/confusion.png`) come last, from the predictions of all folds, and go to
the trackers of the recipe as a tracked run of their own. With
`finetune.seeds` above 1 all of this is repeated in `seed-1/`, `seed-2/`, ..., with run.seed and the
numbers after it, and `results.json` in `run.url` sums up the seeds. A begun run may get more seeds,
and continues with those.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable

from svfap_dist import distributed, storage
from svfap_dist.config import Config, TaskConfig, with_device
from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.evaluate import protocol
from svfap_dist.evaluate.results import Predictions, Results, summarize
from svfap_dist.evaluate.runner import PREDICTIONS
from svfap_dist.evaluate.spread import SeededResults
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.telemetry.journal import RECIPE_FILE, read_recipe
from svfap_dist.telemetry.tracking import Tracking
from svfap_dist.train import loop
from svfap_dist.train.attempt import RunResult
from svfap_dist.train.context import RunContext
from svfap_dist.train.signals import FINISHED

RESULTS, CONFUSION = "results.json", "pictures/confusion.png"

Fold = int  # from 1; 0: the task has a fixed split


@dataclasses.dataclass(frozen=True)
class FinetuneResult:
    """How a fine-tuning ended: "finished" with `results`, or what stopped a fold and None."""

    run_url: str
    stop_reason: str
    results: Results | SeededResults | None
    step: int = 0  # of the fold that was stopped
    fold: Fold = 0

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        if self.results is None:
            which = f"Fold {self.fold} of {self.run_url}" if self.fold else f"Run {self.run_url}"
            ended = f"{which}: {self.stop_reason} at step {self.step}."
            return [ended, "A checkpoint is saved: run the same command again to resume."]
        return [*self.results.lines(), f"Results: {storage.join(self.run_url, RESULTS)}"]


def configs_of_seeds(config: Config) -> list[Config]:
    """Return the recipe of the fine-tuning of each seed, in order; itself where there is one.

    Args:
        config: The recipe of the fine-tuning.
    """
    if (count := config.finetune.seeds) == 1:
        return [config]
    return [_config_of_seed(config, number) for number in range(1, count + 1)]


def _config_of_seed(config: Config, number: int) -> Config:
    """Return the recipe of the fine-tuning with a seed, counted from 1."""
    place = {
        "seed": config.run.seed + number - 1,
        "url": storage.join(config.run.url, f"seed-{number}"),
        "name": f"{config.run.name}-seed-{number}",
    }
    run = config.run.model_copy(update=place)
    finetune = config.finetune.model_copy(update={"seeds": 1})
    return config.model_copy(update={"finetune": finetune, "run": run})


def configs_of_folds(config: Config) -> dict[Fold, Config]:
    """Return the recipe of each fold's run, in order.

    Args:
        config: The recipe of the fine-tuning.

    Raises:
        ConfigError: If there is no task.
    """
    task = protocol.require_task(config)
    if not task.folds:
        return {0: config}
    return {fold: _config_of_fold(config, task, fold) for fold in protocol.folds_of(task)}


def _config_of_fold(config: Config, task: TaskConfig, fold: Fold) -> Config:
    url, name = storage.join(config.run.url, f"fold-{fold}"), f"{config.run.name}-fold-{fold}"
    run = config.run.model_copy(update={"url": url, "name": name})
    return config.model_copy(update={"task": task.model_copy(update={"fold": fold}), "run": run})


def run(
    config: Config,
    train: Callable[[Config, RunContext], RunResult],
    on_fold: Callable[[Fold, int], None] = lambda fold, step: None,
    on_tested: Callable[[Fold, Results], None] = lambda fold, results: None,
    *,
    writes: bool = True,
) -> FinetuneResult:
    """Train and test every fold, with every seed, and summarize.

    Args:
        config: The recipe; it has a [task].
        train: Trains the run of a fold to its end, given its context, and writes predictions of its
            test samples.
        on_fold: Called before each fold that is trained, with the step it resumes from.
        on_tested: Called with the results of each fold that was trained, if `writes`.
        writes: Whether this process writes the results; one of the ranks does.

    Raises:
        ConfigError: If the recipe does not fit the data, or finetune.seeds the begun run; before
            any fold starts.
        ShardError: If the data cannot be read; before any fold starts.
        SvfapError: Any error of `train`.
    """
    began, found = time.monotonic(), []
    config = complete_config(with_device(config, distributed.has_gpu_per_rank))
    config = _with_absolute_init(config)
    _check_seeds(config)
    for one in configs_of_seeds(config):
        ended = _run_folds(one, train, on_fold, on_tested, writes, began)
        if config.finetune.seeds == 1 or not isinstance(ended.results, Results):
            return ended
        found.append(ended.results)
    results = SeededResults(found)
    if writes:
        _write(results, config)
    return FinetuneResult(config.run.url, FINISHED, results)


def _run_folds(
    config: Config,
    train: Callable[[Config, RunContext], RunResult],
    on_fold: Callable[[Fold, int], None],
    on_tested: Callable[[Fold, Results], None],
    writes: bool,
    began: float,
) -> FinetuneResult:
    """Train and test every fold with one seed; the time limit counts from `began`."""
    task, folds = protocol.require_task(config), configs_of_folds(config)
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
        if writes:  # on one rank: others are in the next fold already, so a failed read only skips
            with contextlib.suppress(StorageError):
                on_tested(fold, summarize(task, {fold: _predictions(one)}))
    results = summarize(task, {fold: _predictions(one) for fold, one in folds.items()})
    if writes:
        _write(results, config)
    return FinetuneResult(config.run.url, FINISHED, results)


def _with_absolute_init(config: Config) -> Config:
    """Return the recipe with an absolute finetune.init, which its networks store as their origin.

    It may then be read from any working folder, for its license or by another run.
    """
    init = config.finetune.init
    if not init or storage.is_remote(init):
        return config
    finetune = config.finetune.model_copy(update={"init": storage.local_path(init)})
    return config.model_copy(update={"finetune": finetune})


def _check_seeds(config: Config) -> None:
    """Refuse a number of seeds without a place for what a begun run has; more are no problem."""
    count, url = config.finetune.seeds, config.run.url
    if count > 1 and _is_begun(config):
        found, value = "a run of one seed, which has no folder of its own", "1"
    else:
        numbers = itertools.count(1)
        begun = itertools.takewhile(lambda n: _is_begun(_config_of_seed(config, n)), numbers)
        last = max(begun, default=0)
        if not last or 1 < count >= last:
            return
        found, value = f"seed-1/ to seed-{last}/", f"{max(last, 2)} or more"
    what = "Number of seeds does not fit the begun run"
    do = f"set finetune.seeds={value}, or give another run.url"
    raise ConfigError(what, "finetune.seeds", f"{count}, but {url} has {found}", do)


def _is_begun(config: Config) -> bool:
    """Return whether any fold of a fine-tuning with one seed has begun."""
    task = protocol.require_task(config)
    whole = config.model_copy(update={"task": task.model_copy(update={"fold": 0})})
    urls = (one.run.url for one in configs_of_folds(whole).values())
    return any(storage.exists(storage.join(url, RECIPE_FILE)) for url in urls)


def _predictions(config: Config) -> Predictions:
    return Predictions.read(storage.join(config.run.url, PREDICTIONS))


def _is_tested(config: Config) -> bool:
    """Return whether a fold is tested at its length; refuse tests with other views."""
    if not storage.exists(storage.join(config.run.url, PREDICTIONS)):
        return False
    stored = read_recipe(config.run.url)
    lengths = [
        (one.train.max_steps, one.train.epochs, one.finetune.patience) for one in (stored, config)
    ]
    if lengths[0] != lengths[1]:
        return False  # run.allow_change: it is trained further
    then, now = stored.finetune, config.finetune
    for name in ("test_segments", "test_crops"):
        before, wanted = getattr(then, name), getattr(now, name)
        if before != wanted:
            found = f"{wanted}, but {config.run.url} was tested with {before}"
            do = "set it back, and test again with `svfap evaluate`, which takes other values"
            raise ConfigError("Already tested with other views", f"finetune.{name}", found, do)
    return True


def _with_time_left(config: Config, spent: float) -> Config:
    """Return the recipe of a fold that begins `spent` seconds into train.max_seconds."""
    if not (limit := config.train.max_seconds):
        return config
    train = config.train.model_copy(update={"max_seconds": max(math.ceil(limit - spent), 1)})
    return config.model_copy(update={"train": train})


def _write(results: Results | SeededResults, config: Config) -> None:
    url, task = config.run.url, protocol.require_task(config)
    storage.write_bytes(storage.join(url, RESULTS), results.to_json().encode())
    is_single, picture = isinstance(results, Results), b""
    if isinstance(results, Results) and results.confusion is not None:
        picture = results.picture()
        storage.write_bytes(storage.join(url, CONFUSION), picture)
    if is_single and not task.folds:  # one run, which has recorded its scores itself
        return
    with Tracking(config, step=0) as tracking:
        means = {name: results.mean(name) for name in task.metrics}
        tracking.write_scalars("results", 0, means)
        if picture:
            tracking.write_picture("confusion", 0, picture)
