"""Testing again what was fine-tuned: the recipe says how, a checkpoint what.

No DeepSpeed is needed: the weights alone are loaded. So a finished fine-tuning can be tested with
other segments or crops, or on another machine.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from svfap_dist.checkpoint import load
from svfap_dist.config import Config, TaskConfig
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError
from svfap_dist.evaluate.predictions import Predictions
from svfap_dist.evaluate.results import Results, summarise
from svfap_dist.model import weights
from svfap_dist.shards.reader import open_data
from svfap_dist.train import finetune, split, testing


def run(
    config: Config,
    url: str,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Test the checkpoint(s) at `url`, a run of `svfap finetune`, of one fold of it, or one of its
    checkpoints, by the protocol of the recipe.

    Raises: ConfigError, ShardError, CheckpointError, StorageError.
    """
    task = finetune.task_of(config)
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    manifest = open_data(config, config.data.url)
    folds: dict[int, Predictions] = {}
    for fold, where in finetune.found(config, url).items():
        path, theirs = load.locate_weights(where)
        _check_fits(config, task, theirs, path)
        # What the outputs mean is the network's own.
        output = {"output": theirs.finetune.output}
        one = config.model_copy(
            update={
                "task": task.model_copy(update={"fold": fold}),
                "finetune": config.finetune.model_copy(update=output),
            }
        )
        model = weights.load_classifier(path).to(device)
        with torch.no_grad():
            tested = testing.predict(
                one,
                manifest,
                World(0, 0, 1, 1),
                split.sides(one, manifest).test,
                model,
                device,
                on_sample,
            )
        folds[fold] = tested.predictions
    return summarise(task, folds)


def _check_fits(config: Config, task: TaskConfig, theirs: Config, path: str) -> None:
    """Raises: CheckpointError if a checkpoint is of another task or takes other clips."""
    if theirs.task is None or (theirs.task.kind, theirs.task.names) != (task.kind, task.names):
        raise CheckpointError(
            "Checkpoint is of another task",
            where=path,
            found=f"{theirs.task.names if theirs.task else 'pre-training'}, "
            f"where the recipe has {task.names}",
            do="give the recipe that it was fine-tuned by",
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
