"""`svfap bench transfer`: how much pre-training helps on a labeled set, by labels per class.

In: a recipe of fine-tuning and pre-trained weights. Out: a table of scores, pooled over the folds
of the recipe's protocol, for each method, number of labels per class and seed. Both sides of a
comparison draw the same labels with the same seed and have the same recipe, except for settings
that name a method.

Methods that train are ordinary fine-tunings (`train.finetune`), run one after another in this
process; classifiers of frozen features read the features from one file per set of weights. Each
cell leaves a small file in `cells/` when it is done, so that the same command continues a table
that was interrupted; an unfinished fine-tuning resumes too, and its folder is deleted afterwards.
Several commands may share the cells (`TransferOptions.part`), on one machine or several.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch

from svfap_dist import distributed, json_text, storage
from svfap_dist.bench import transfer_picture
from svfap_dist.bench.frozen_features import load_features
from svfap_dist.bench.transfer_setup import METHODS, TransferOptions, TransferSetup, set_up_transfer
from svfap_dist.bench.transfer_table import (
    PAIRS,
    Cell,
    CellResult,
    Interval,
    TransferTable,
)
from svfap_dist.config import Config
from svfap_dist.errors import ConfigError, HealthError
from svfap_dist.evaluate import feature_probe, protocol
from svfap_dist.evaluate.results import Predictions, Results, summarize
from svfap_dist.evaluate.spread import bootstrap_difference
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest
from svfap_dist.train import finetune, loop
from svfap_dist.train.engine import process_group
from svfap_dist.train.signals import FINISHED, catch_stop_signals

TABLE_JSON, TABLE_MARKDOWN, PICTURE = "transfer.json", "transfer.md", "pictures/transfer.png"

log = logging.getLogger(__name__)


def run(
    name: str,
    overrides: Sequence[str],
    options: TransferOptions,
    on_cell: Callable[[CellResult | None, TransferTable], None] = lambda result, table: None,
) -> TransferTable:
    """Compute the cells that are missing, and write the table after each.

    Args:
        name: recipe of a fine-tuning; its run.url is the folder of the table.
        overrides: of the recipe, for all methods.
        options: what is compared.
        on_cell: called before the first cell with None, and after each with its result.

    Raises:
        ConfigError: The options, the recipe, the data and finished cells do not fit each other.
        ShardError: The data cannot be read, or a class has too few labels.
        CheckpointError: The initial weights cannot be read.
        SvfapError: Any error of a training.
    """
    setup = set_up_transfer(name, overrides, options)
    configs = {cell: setup.config_of(cell) for cell in setup.table.cells()}
    results = {cell: found for cell in configs if (found := _stored(setup, configs[cell], cell))}
    table = dataclasses.replace(setup.table, results=tuple(results.values()))
    on_cell(None, table)
    todo = [cell for cell in setup.table.cells_of_part(*options.part) if cell not in results]
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(catch_stop_signals())
        first = next(iter(configs.values()))
        device = stack.enter_context(process_group(first, distributed.world_from_environment()))
        for cell in todo:
            config, began, found = configs[cell], time.monotonic(), caught()
            try:
                found = found or _compute(setup, config, METHODS[cell.method].classifier, device)
            except HealthError as error:  # the other cells may still succeed
                log.error("Cell %s failed: %s", cell.name, error)
                failed[cell.name] = str(error)
                table = dataclasses.replace(table, failed=failed)
                continue
            if isinstance(found, str):
                return dataclasses.replace(table, stop_reason=found)
            results[cell] = _store(setup, config, cell, found, time.monotonic() - began)
            in_order = tuple(results[cell] for cell in configs if cell in results)
            table = dataclasses.replace(table, results=in_order)
            if options.part == (1, 1):
                _write(table, setup)
            on_cell(results[cell], table)
    table = dataclasses.replace(table, stop_reason=FINISHED)
    if options.part == (1, 1):
        table = dataclasses.replace(table, intervals=_intervals(setup, table))
        _write(table, setup)
        if len(table.results) > 1:
            picture = transfer_picture.draw(table)
            storage.write_bytes(storage.join(setup.url, PICTURE), picture)
    return table


def _write(table: TransferTable, setup: TransferSetup) -> None:
    storage.write_bytes(storage.join(setup.url, TABLE_JSON), table.to_json().encode())
    storage.write_bytes(storage.join(setup.url, TABLE_MARKDOWN), table.to_markdown().encode())


def _intervals(setup: TransferSetup, table: TransferTable) -> tuple[Interval, ...]:
    """Return intervals over other test samples, of whole subjects where the set names them."""
    config, found = next(iter(setup.configs.values())), []
    task, groups = protocol.require_task(config), _subjects(config, setup.manifest)
    for method, baseline in PAIRS:
        for labels in table.labels:
            sides = [_predictions(setup, table, name, labels) for name in (method, baseline)]
            if both := sorted(sides[0].keys() & sides[1].keys()):
                better, worse = ([side[seed] for seed in both] for side in sides)
                ends = bootstrap_difference(task, better, worse, groups)
                found.append(Interval(method, labels, *ends))
    return tuple(found)


def _predictions(
    setup: TransferSetup, table: TransferTable, method: str, labels: int
) -> dict[int, Predictions]:
    """Return the predictions of a method with some labels per class, by seed."""
    return {
        cell.seed: Predictions.read(_file_of(setup, cell, "predictions.jsonl"))
        for cell in (result.cell for result in table.results)
        if (cell.method, cell.labels) == (method, labels)
    }


def _subjects(config: Config, manifest: Manifest) -> dict[str, str]:
    """Return the person of each sample, or the sample itself where the set does not say."""
    found = {}
    for entry in manifest.shards:
        index = shard_format.load_index(config.data.url, entry)
        for key, row in zip(index.keys, index.labels, strict=True):
            found[key] = str(row["subject"]) if "subject" in row else key
    return found


def _file_of(setup: TransferSetup, cell: Cell, ending: str) -> str:
    return storage.join(setup.configs[cell.method].run.url, "cells", f"{cell.name}.{ending}")


def _stored(setup: TransferSetup, config: Config, cell: Cell) -> CellResult | None:
    """Return the result of a cell that an earlier command has finished, or None.

    Raises:
        ConfigError: It was computed with something else.
    """
    where = _file_of(setup, cell, "json")
    try:
        content = json_text.loads(storage.read_bytes(where))
        identity = content["identity"]
        result = CellResult(cell, content["values"], content["num_samples"], content["seconds"])
    except storage.StorageMissingError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        do = "delete the file, and the cell is computed again"
        raise ConfigError("Invalid file of a cell", where, repr(error), do) from error
    for key, now in setup.identity(config).items():
        if identity.get(key) != now:
            found = f"another {key}: {identity.get(key)}, now {now}"
            do = "give another run.url for another table, or delete the file to compute it again"
            raise ConfigError("Cell was computed with something else", where, found, do)
    return result


def _store(
    setup: TransferSetup, config: Config, cell: Cell, results: Results, seconds: float
) -> CellResult:
    """Write the result of a cell, its predictions first, and delete its run."""
    pooled = results.pooled
    content = {
        **dataclasses.asdict(cell),
        "values": pooled.values,
        "num_samples": pooled.num_samples,
        "seconds": round(seconds, 3),
        "per_fold": {str(fold): score.values for fold, score in results.folds.items()},
        "confusion": None if results.confusion is None else results.confusion.tolist(),
        "identity": setup.identity(config),
    }
    results.predictions.write(_file_of(setup, cell, "predictions.jsonl"))
    text = json_text.dumps(content, indent=1) + "\n"
    storage.write_bytes(_file_of(setup, cell, "json"), text.encode())
    storage.delete(config.run.url)
    return CellResult(cell, pooled.values, pooled.num_samples, content["seconds"])


def _compute(
    setup: TransferSetup, config: Config, classifier: str, device: torch.device
) -> Results | str:
    """Return the result of a cell, or why it stopped."""
    return _probe(setup, config, classifier, device) if classifier else _train(config)


def _train(config: Config) -> Results | str:
    """Fine-tune and test all folds; return why it stopped if it did."""
    folds = finetune.configs_of_folds(config)

    def drop_checkpoints(fold: int, results: Results) -> None:
        storage.delete(storage.join(folds[fold].run.url, "checkpoints"))

    ended = finetune.run(
        config,
        lambda one, context: loop.run(one, context=context),
        on_tested=drop_checkpoints,
    )
    return ended.stop_reason if ended.results is None else cast(Results, ended.results)


def _probe(setup: TransferSetup, config: Config, classifier: str, device: torch.device) -> Results:
    """Train and test a classifier of frozen features on all folds."""
    task = protocol.require_task(config)
    folder = storage.join(setup.url, "features")
    folds, features = {}, load_features(config, setup.manifest, device, folder)
    # More neighbors than labels of a class would be of other classes, for the most part.
    neighbors = min(config.probe.neighbors, task.labels_per_class or config.probe.neighbors)
    for fold in protocol.folds_of(task):
        split = protocol.split_samples(config, setup.manifest, fold)
        train, test = (features.rows_of(side.indices) for side in split[:2])
        predicted = feature_probe.predict(
            features.values[train.rows],
            split.train.targets[train.is_there],
            features.values[test.rows],
            neighbors,
            (classifier,),
        )[classifier]
        keys = tuple(features.keys[test.rows].tolist())
        scores = np.eye(len(task.names), dtype=np.float32)[predicted]
        folds[fold] = Predictions(keys, split.test.targets[test.is_there], scores)
    return summarize(task, folds)
