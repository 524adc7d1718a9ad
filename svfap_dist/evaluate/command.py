"""`svfap evaluate`: test fine-tuned checkpoints again, by a recipe.

In: a recipe, and the URL of a fine-tuning, of one of its folds, or of a checkpoint. Out: `Results`
and the predictions that they were computed from. The weights alone are loaded, without DeepSpeed,
so a finished fine-tuning can be tested with other segments or crops, or on another machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from svfap_dist import storage
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, TaskConfig, with_device
from svfap_dist.distributed import World, has_gpu_per_rank
from svfap_dist.errors import CheckpointError
from svfap_dist.evaluate import protocol, runner
from svfap_dist.evaluate.results import Predictions, Results, summarize
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.model import weights
from svfap_dist.shards.mixture import open_training_data


def evaluate(
    config: Config,
    url: str,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
    predictions_url: str = "",
) -> Results:
    """Test the checkpoints of a fine-tuning by the protocol of the recipe.

    Args:
        config: the recipe; it has a [task].
        url: a run of `svfap finetune`, of one fold of it, or one of its checkpoints.
        on_sample: called with the samples of a fold that are done, and how many it has.
        predictions_url: file for the scores of each sample, all folds together; empty: none.

    Raises:
        ConfigError: There is no task, or it does not fit the labels.
        CheckpointError: There is no checkpoint, or it belongs to another task.
        ShardError: The data cannot be read.
        StorageError: The store fails.
    """
    config = complete_config(with_device(config, has_gpu_per_rank))
    task = protocol.require_task(config)
    device = torch.device("cuda" if config.cluster.on_gpu else "cpu")
    manifest = open_training_data(config)
    folds: dict[int, Predictions] = {}
    for fold, where in _fold_urls(config, url).items():
        path, theirs = load.locate_weights(where)
        _check_fits(config, task, theirs, path)
        # The activation of the outputs is a property of the network, not of the recipe.
        finetune = config.finetune.model_copy(update={"output": theirs.finetune.output})
        model = weights.load_classifier(path).to(device)
        with torch.no_grad():
            tested = runner.score_selection(
                config.model_copy(update={"finetune": finetune}),
                manifest,
                World(0, 0, 1, 1),
                protocol.split_samples(config, manifest, fold).test,
                model,
                device,
                on_sample,
            )
        folds[fold] = tested.predictions
    if predictions_url:
        Predictions.concatenate(list(folds.values())).write(predictions_url)
    return summarize(task, folds)


def _fold_urls(config: Config, url: str) -> Mapping[int, str]:
    """Return where the weights of each fold are, or of the only one there is."""

    def of(fold: int) -> str:
        return storage.join(url, f"fold-{fold}") if fold else url

    folds = protocol.folds_of(protocol.require_task(config))
    if any(storage.list_files(storage.join(of(fold), "checkpoints")) for fold in folds):
        return {fold: of(fold) for fold in folds}
    _, theirs = load.locate_weights(url)  # the run of a fold, or one of its checkpoints
    return {theirs.task.fold if theirs.task else 0: url}


def _check_fits(config: Config, task: TaskConfig, theirs: Config, path: str) -> None:
    """Refuse a checkpoint of another task, or for other clips."""
    if theirs.task is None or (theirs.task.kind, theirs.task.names) != (task.kind, task.names):
        raise CheckpointError(
            "Checkpoint belongs to another task",
            where=path,
            found=f"{theirs.task.names if theirs.task else 'pre-training'}, "
            f"where the recipe has {task.names}",
            do="give the recipe that it was fine-tuned with",
        )
    for name in ("num_frames", "frame_size"):
        mine, other = getattr(config.data, name), getattr(theirs.data, name)
        if mine != other:
            raise CheckpointError(
                "Checkpoint takes other clips",
                where=path,
                found=f"data.{name} = {other}, where the recipe has {mine}",
                do=f"set data.{name}={other}",
            )
