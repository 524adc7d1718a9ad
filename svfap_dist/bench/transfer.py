"""`svfap bench transfer`: how much pre-training helps on a labeled set, by labels per class.

In: a recipe of fine-tuning and pre-trained weights. Out: a table of scores, pooled over the folds
of the recipe's protocol, for each method, number of labels per class and seed. Both sides of a
comparison draw the same labels with the same seed and have the same recipe, except for settings
that name a method.

Methods that train are ordinary fine-tunings (`train.finetune`), run one after another in this
process; classifiers of frozen features read the features from one file per set of weights. Each
cell leaves a small file in `cells/` when it is done, so that the same command continues a table
that was interrupted; an unfinished fine-tuning resumes too, and its folder is deleted afterwards.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from svfap_dist import distributed, json_text, storage
from svfap_dist.bench.transfer_table import Cell, CellResult, TransferTable, compute_power
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, recipe, require_urls, with_device
from svfap_dist.config.sections import ModelConfig
from svfap_dist.data.sample_order import steps_per_epoch
from svfap_dist.errors import ConfigError, ShardError, nearest
from svfap_dist.evaluate import feature_probe, protocol
from svfap_dist.evaluate.results import Predictions, Results, summarize
from svfap_dist.evaluate.runner import Decoding, ViewedVideo, view_videos
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.model.classifier import Classifier
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import open_training_data
from svfap_dist.shards.reader import SampleReader
from svfap_dist.train import finetune, loop
from svfap_dist.train.engine import process_group
from svfap_dist.train.objective import build_objective
from svfap_dist.train.signals import FINISHED, catch_stop_signals
from svfap_dist.video.info import segment_views

TABLE_JSON, TABLE_MARKDOWN = "transfer.json", "transfer.md"
# Of hundreds of short trainings in one process: workers and endpoints would start with each.
_HERE = (
    "data.decode_workers=0",
    "data.feeders=0",
    "cluster.num_workers=1",
    "metrics.enabled=false",
)
# The named size of another encoder has its own.
_DIMENSIONS = (
    *("embed_dim", "num_heads", "stage_depths", "temporal_kernel_size", "num_bottleneck_tokens"),
    *("decoder_embed_dim", "decoder_num_heads", "decoder_depth"),
)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Method:
    """How predictions are made: a row of `METHODS`.

    Attributes:
        init: initial weights: "" (none), "init" or "vit_init".
        mode: finetune.mode of its training.
        classifier: of frozen features, instead of a training; "": none.
        is_vit: whether the encoder is the plain ViT, whatever the recipe has.
    """

    init: str = ""
    mode: str = "full"
    classifier: str = ""
    is_vit: bool = False


METHODS: Mapping[str, Method] = {
    "scratch": Method(),
    "pretrained": Method("init"),
    "linear": Method("init", "linear", classifier="logistic"),
    "attentive": Method("init", "attentive"),
    "lora": Method("init", "lora"),
    "knn": Method("init", "linear", classifier="knn"),
    "vit": Method(is_vit=True),
    "vit-pretrained": Method("vit_init", is_vit=True),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the table compares.

    Attributes:
        init: pre-trained run, checkpoint or export; empty: the recipe's finetune.init.
        vit_init: the same of a plain ViT; empty: the ViT is trained from scratch only.
        labels: per class; 0: all.
        methods: names of `METHODS`.
        seeds: number of seeds: run.seed and those after it.
        settings: METHOD:KEY=VALUE, recipe keys of one method.
    """

    init: str = ""
    vit_init: str = ""
    labels: tuple[int, ...] = (5, 10, 20, 0)
    methods: tuple[str, ...] = ("scratch", "pretrained", "linear", "attentive", "knn", "vit")
    seeds: int = 5
    settings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        configs: recipe by method; run.url is the folder of the table.
        manifest: of the labeled set.
        table: without results.
    """

    configs: Mapping[str, Config]
    manifest: Manifest
    table: TransferTable

    def config_of(self, cell: Cell) -> Config:
        """Return the recipe of a cell, whose run has a folder of its own.

        Args:
            cell: which one.
        """
        config = self.configs[cell.method]
        url = storage.join(config.run.url, "runs", cell.name)
        place = {"seed": config.run.seed + cell.seed, "url": url, "name": cell.name}
        task = protocol.require_task(config).model_copy(update={"labels_per_class": cell.labels})
        run = config.run.model_copy(update=place)
        return config.model_copy(update={"task": task, "run": run})

    def identity(self, config: Config) -> dict[str, Any]:
        """Return what decides the numbers of a cell, to compare with those of an earlier command.

        Args:
            config: recipe of the cell.
        """
        return {
            "data set": self.manifest.fingerprint,
            "recipe": config.fingerprint,
            "initial weights": config.finetune.init,
            "views in the test": [config.finetune.test_segments, config.finetune.test_crops],
            "probe.neighbors": config.probe.neighbors,
            "metrics": list(protocol.require_task(config).metrics),
        }


def run(
    name: str,
    overrides: Sequence[str],
    options: Options,
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
    setup = set_up(name, overrides, options)
    configs = {cell: setup.config_of(cell) for cell in setup.table.cells()}
    results = {cell: found for cell in configs if (found := _stored(setup, configs[cell], cell))}
    table = dataclasses.replace(setup.table, results=tuple(results.values()))
    on_cell(None, table)
    first = next(iter(configs.values()))
    with contextlib.ExitStack() as stack:
        caught = stack.enter_context(catch_stop_signals())
        device = stack.enter_context(process_group(first, distributed.world_from_environment()))
        for cell, config in configs.items():
            if cell in results:
                continue
            began, found = time.monotonic(), caught()
            if not found:
                classifier = METHODS[cell.method].classifier
                found = _probe(setup, config, classifier, device) if classifier else _train(config)
            if isinstance(found, str):
                return dataclasses.replace(table, stop_reason=found)
            results[cell] = _store(setup, config, cell, found, time.monotonic() - began)
            in_order = tuple(results[cell] for cell in configs if cell in results)
            table = dataclasses.replace(table, results=in_order)
            _write(table, setup)
            on_cell(results[cell], table)
    table = dataclasses.replace(table, stop_reason=FINISHED)
    _write(table, setup)
    return table


def _write(table: TransferTable, setup: Setup) -> None:
    url = next(iter(setup.configs.values())).run.url
    storage.write_bytes(storage.join(url, TABLE_JSON), table.to_json().encode())
    storage.write_bytes(storage.join(url, TABLE_MARKDOWN), table.to_markdown().encode())


# ---- before the first cell


def set_up(name: str, overrides: Sequence[str], options: Options) -> Setup:
    """Check everything that can be wrong before hours of training, and return what cells share.

    Args:
        name: see `run`.
        overrides: see `run`.
        options: see `run`.

    Raises:
        SvfapError: As `run` does.
    """
    options = _checked(options)
    complete = _Completed(name, overrides)
    base = complete([])
    require_urls(base)
    init = options.init or base.finetune.init
    urls = {"": "", "init": init, "vit_init": options.vit_init}
    for method in options.methods:
        if (key := METHODS[method].init) and not urls[key]:
            option = f"--{key.replace('_', '-')}"
            do = f"give {option} RUN_OR_CHECKPOINT, or leave the method out of --methods"
            raise ConfigError("Method needs pre-trained weights", "--methods", method, do)
    urls = {key: url and load.weights_url(url) for key, url in urls.items()}
    configs = {
        method: _config_of(METHODS[method], complete, _settings_of(method, options), urls)
        for method in options.methods
    }
    manifest = open_training_data(base)
    for method, config in configs.items():
        _check_method(method, config)
    task = protocol.require_task(base)
    metric = task.metrics[0]
    tested, power = _tested_targets(configs, manifest, options), None
    if task.kind == "classification":
        power = compute_power(metric, [int(n) for n in np.bincount(tested) if n], options.seeds)
    table = TransferTable(
        set=task.set,
        label=task.label,
        metric=metric,
        methods=options.methods,
        labels=options.labels,
        seeds=options.seeds,
        results=(),
        power=power,
        stop_reason="",
    )
    return Setup(configs, manifest, table)


def _checked(options: Options) -> Options:
    """Return the options, with the pre-trained ViT beside the other one if it has weights."""
    for method in options.methods:
        if method not in METHODS:
            raise ConfigError("No such method", "--methods", method, nearest(method, METHODS))
    for setting in options.settings:
        method, colon, override = setting.partition(":")
        if not colon or "=" not in override:
            do = "write it as METHOD:KEY=VALUE, e.g. attentive:optim.lr=1e-2"
            raise ConfigError("Unreadable setting of a method", "--set", setting, do)
        if method not in METHODS:
            raise ConfigError("No such method", "--set", setting, nearest(method, METHODS))
    methods = list(dict.fromkeys(options.methods))
    if options.vit_init and "vit" in methods and "vit-pretrained" not in methods:
        methods.insert(methods.index("vit") + 1, "vit-pretrained")
    labels = tuple(dict.fromkeys(options.labels))
    return dataclasses.replace(options, methods=tuple(methods), labels=labels)


def _settings_of(method: str, options: Options) -> list[str]:
    prefix = f"{method}:"
    return [s.removeprefix(prefix) for s in options.settings if s.startswith(prefix)]


class _Completed:
    """Loads the recipe with more overrides, and completes its task from the data, once each."""

    def __init__(self, name: str, overrides: Sequence[str]) -> None:
        self._name, self._overrides = name, [*_HERE, *overrides]
        self._known: dict[tuple[str, ...], Config] = {}

    def __call__(self, more: Sequence[str]) -> Config:
        """Return the recipe.

        Args:
            more: overrides, which win.
        """
        if (key := tuple(more)) not in self._known:
            config = recipe.load(self._name, [*self._overrides, *more])
            protocol.require_task(config)
            config = with_device(config, distributed.has_gpu_per_rank)
            self._known[key] = complete_config(config)
        return self._known[key]


def _config_of(
    method: Method, complete: _Completed, settings: Sequence[str], urls: Mapping[str, str]
) -> Config:
    """Return the recipe of a method: what it starts from, what it trains, and its encoder."""
    base, config = complete([]), complete(settings)
    is_attentive = method.mode == "attentive"
    pool = config.finetune.pool
    if is_attentive or (method.classifier and pool == "attentive"):
        pool = "mean"  # the mode has its own pooler, and an untrained one says nothing
    changes = {"init": urls[method.init], "mode": method.mode, "pool": pool, "seeds": 1}
    config = config.model_copy(update={"finetune": config.finetune.model_copy(update=changes)})
    if not method.is_vit:
        return config
    if url := urls["vit_init"]:
        build = load.load_build(url)
        fields = {key: build[key] for key in ModelConfig.model_fields if key in build}
        model = ModelConfig.model_validate_json(json.dumps(fields))
    else:
        same = [n for n in _DIMENSIONS if getattr(config.model, n) == getattr(base.model, n)]
        model = config.model.model_copy(update={"encoder": "vit", **dict.fromkeys(same)})
    return config.model_copy(update={"model": model})


def _check_method(method: str, config: Config) -> None:
    build_objective(config).check_initial_weights()
    if not METHODS[method].classifier:
        return
    if protocol.require_task(config).kind != "classification":
        do = "use --methods scratch,pretrained,attentive,vit"
        raise ConfigError("Method needs classes", "--methods", f"{method}, for a regression", do)
    if find_spec("sklearn") is None:
        do = f"pip install 'svfap-dist[probe]', or leave {method} out"
        raise ConfigError("Method needs scikit-learn", "--methods", "it is not installed", do)


def _tested_targets(
    configs: Mapping[str, Config], manifest: Manifest, options: Options
) -> np.ndarray:
    """Return the targets of all test samples, after checking that every fold has enough labels."""
    config = next(iter(configs.values()))
    trained = [one for method, one in configs.items() if not METHODS[method].classifier]
    batch = max((one.samples_per_step for one in trained), default=1)
    tested = []
    for labels in options.labels:
        task = protocol.require_task(config).model_copy(update={"labels_per_class": labels})
        few = config.model_copy(update={"task": task})
        splits = [protocol.split_samples(few, manifest, fold) for fold in protocol.folds_of(task)]
        for split in splits:
            steps_per_epoch(len(split.train), batch)
        tested = [split.test.targets for split in splits]
    return np.concatenate(tested)


# ---- cells


def _file_of(setup: Setup, cell: Cell, ending: str) -> str:
    return storage.join(setup.configs[cell.method].run.url, "cells", f"{cell.name}.{ending}")


def _stored(setup: Setup, config: Config, cell: Cell) -> CellResult | None:
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
    setup: Setup, config: Config, cell: Cell, results: Results, seconds: float
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


def _probe(setup: Setup, config: Config, classifier: str, device: torch.device) -> Results:
    """Train and test a classifier of frozen features on all folds."""
    task = protocol.require_task(config)
    folds, features = {}, _load_features(setup, config, device)
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


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows of features; is_there: which of the samples have one, bool."""

    rows: np.ndarray
    is_there: np.ndarray


@dataclasses.dataclass(frozen=True)
class _Features:
    """Features [N, D] of samples; indices: ascending, in the data set; keys: their names."""

    indices: np.ndarray
    keys: np.ndarray
    values: np.ndarray

    def rows_of(self, samples: np.ndarray) -> _Rows:
        """Return where samples are.

        Args:
            samples: indices in the data set.
        """
        rows = np.searchsorted(self.indices, samples)
        rows = np.minimum(rows, len(self.indices) - 1)
        is_there = self.indices[rows] == samples
        return _Rows(rows[is_there], is_there)

    def to_bytes(self) -> bytes:
        """Return the content of their file."""
        file = io.BytesIO()
        np.savez(file, indices=self.indices, keys=self.keys, values=self.values)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes) -> _Features:
        """Return what `to_bytes` wrote.

        Args:
            content: of the file.
        """
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return cls(file["indices"], file["keys"], file["values"])


def _load_features(setup: Setup, config: Config, device: torch.device) -> _Features:
    """Return the features of all samples of the data set, from their file if they have one."""
    objective, data, views = build_objective(config), config.data, config.finetune
    identity = [
        setup.manifest.fingerprint,
        config.finetune.init,
        dict(objective.build_arguments),
        [data.num_frames, data.sampling_rate, data.frame_size, data.region],
        [views.test_segments, views.test_crops],
    ]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    table_url = setup.configs[next(iter(setup.configs))].run.url
    where = storage.join(table_url, "features", f"{digest}.npz")
    with contextlib.suppress(storage.StorageMissingError):
        return _Features.from_bytes(storage.read_bytes(where))
    log.info("Computing the features of %d samples.", setup.manifest.num_samples)
    rows = _features_of(setup, config, device)
    if not rows:
        found, do = "none", "run `svfap shards verify` on data.url"
        raise ShardError("No sample can be read", ", ".join(data.urls), found, do)
    if (missing := setup.manifest.num_samples - len(rows)) > 0:
        log.warning("%d samples cannot be used and do not count.", missing)
    indices, keys, values = zip(*rows, strict=True)
    features = _Features(np.array(indices, np.int64), np.array(keys), np.stack(values))
    storage.write_bytes(where, features.to_bytes())
    return features


def _features_of(
    setup: Setup, config: Config, device: torch.device
) -> list[tuple[int, str, np.ndarray]]:
    """Return index, key and feature of each sample: what the head sees, averaged over views."""
    data, views = config.data, config.finetune
    model = cast(Classifier, build_objective(config).build())
    model.head = cast(Any, nn.Identity())
    model = model.to(device).eval()
    reader, samples = SampleReader(data.url, setup.manifest), range(setup.manifest.num_samples)
    videos = view_videos(
        [partial(reader.read, index) for index in samples],
        data,
        segment_views(data, data.region, views.test_segments, views.test_crops),
        lambda clips: model(clips.to(device)).float(),
        batch_size=config.train.micro_batch_size,
        decoding=Decoding.of(data, config.decode.backend),
    )
    with torch.no_grad(), contextlib.closing(videos):
        return [
            (index, video.key, video.mean)
            for index, video in zip(samples, videos, strict=True)
            if isinstance(video, ViewedVideo)
        ]
