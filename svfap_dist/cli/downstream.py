"""`svfap finetune`, `svfap evaluate`: training and testing on labeled data sets."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, On, Overrides, Recipe, app, print_result
from svfap_dist.cli.training import (
    check_place,
    decide_device,
    is_main_process,
    launch_training,
)
from svfap_dist.progress import Progress, say, waiting


@app.command()
def finetune(
    name: Recipe, overrides: Overrides = None, on: On = "local", as_json: AsJson = False
) -> None:
    """Fine-tune on a labeled data set and test, for every fold of its protocol.

    Trains a classifier or a regressor, as the recipe's [task] says; task.fold=2 runs one fold only.
    Run the same command again to resume; Ctrl-C saves a checkpoint first.

    Example: svfap finetune finetune_dfew data.url=s3://bucket/dfew run.url=s3://bucket/runs/dfew
    finetune.init=s3://bucket/runs/base --on ray
    """
    from svfap_dist.config import recipe
    from svfap_dist.evaluate.protocol import require_task

    config = recipe.load(name, overrides or [])
    require_task(config)
    check_place(on)

    def on_fold(fold: int, step: int) -> None:
        which = f"Fold {fold}" if fold else "Training"
        if is_main_process():
            say(f"{which} resumes from step {step}." if step else f"{which} starts.")

    def on_tested(fold: int, results: Any) -> None:
        if is_main_process() and fold:
            say(f"Fold {fold}: {results.line()}.")

    def train(one: Any, context: Any) -> Any:
        with Progress("Fine-tuning", silent=not is_main_process()) as progress:
            return launch_training(one, context, on, progress)

    with waiting("Checking data, checkpoints and results", silent=not is_main_process()):
        from svfap_dist.train import finetune as tuning

        if on == "local":
            config = decide_device(config, on)
        with _one_group(config, on):
            config = decide_device(config, on)  # by the Ray cluster, now that it is connected
            result = tuning.run(config, train, on_fold, on_tested, writes=is_main_process())
    if is_main_process():
        _print(result, result.results, as_json)
    from svfap_dist.train.signals import exit_code

    sys.exit(exit_code(result.stop_reason))


@contextlib.contextmanager
def _one_group(config: Any, on: str) -> Any:
    """Share one Ray cluster or process group, and the signal handlers, among all folds."""
    from svfap_dist.train.signals import catch_stop_signals

    if on == "ray":
        from svfap_dist.cluster.connection import connected

        with connected(config.cluster), catch_stop_signals():  # Ray sets handlers when it connects
            yield
        return
    from svfap_dist import distributed
    from svfap_dist.train.engine import process_group

    with catch_stop_signals(), process_group(config, distributed.world_from_environment()):
        yield


@app.command()
def evaluate(
    name: Recipe,
    checkpoint: Annotated[
        str,
        typer.Argument(help="URL of a run of `svfap finetune`, of one fold, or of a checkpoint."),
    ],
    overrides: Overrides = None,
    predictions: Annotated[
        str, typer.Option(help="File for each sample's scores, as JSON lines (default: none).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Test a fine-tuned network with its recipe, without training.

    Example: svfap evaluate finetune_dfew runs/dfew data.url=shards/dfew finetune.test_segments=4
    """
    from svfap_dist.config import recipe

    config = recipe.load(name, overrides or [])
    with Progress("Testing") as progress:
        from svfap_dist.evaluate import command

        results = command.evaluate(config, checkpoint, progress.update, predictions)
    _print(results, results, as_json)


def _print(shown: Any, results: Any, as_json: bool) -> None:
    """Print the table, or the content of results.json."""
    if as_json and results is not None:
        print(results.to_json(), end="")
    else:
        print_result(shown, as_json)
