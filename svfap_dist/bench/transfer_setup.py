"""What `svfap bench transfer` compares: its methods, options and recipes, checked before it trains.

In: a recipe of fine-tuning, initial weights, and the options. Out: a `TransferSetup`, which has a
recipe for each method and from it that of each cell. To add a method, add its row to `METHODS`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from svfap_dist import distributed, storage
from svfap_dist.bench.transfer_table import Cell, TransferTable, compute_power, labels_text
from svfap_dist.checkpoint import load
from svfap_dist.config import Config, recipe, require_urls, with_device
from svfap_dist.config.sections import ModelConfig
from svfap_dist.data.sample_order import steps_per_epoch
from svfap_dist.errors import ConfigError, nearest
from svfap_dist.evaluate import protocol
from svfap_dist.evaluate.task_of_data import complete_config
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import open_training_data
from svfap_dist.train.objective import build_objective

# For hundreds of short trainings in one process: each would start workers and endpoints.
_IN_PROCESS = (
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
class TransferOptions:
    """What the table compares.

    Attributes:
        init: pre-trained run, checkpoint or export; empty: the recipe's finetune.init.
        vit_init: the same of a plain ViT; empty: the ViT is trained from scratch only.
        labels: per class; 0: all.
        methods: names of `METHODS`.
        seeds: number of seeds: run.seed and those after it.
        settings: METHOD:KEY=VALUE, recipe keys of one method.
        part: number of this command, from 1, and of all commands that share the cells; where there
            are several, none of them writes the table.
    """

    init: str = ""
    vit_init: str = ""
    labels: tuple[int, ...] = (5, 10, 20, 0)
    methods: tuple[str, ...] = ("scratch", "pretrained", "linear", "attentive", "knn", "vit")
    seeds: int = 5
    settings: tuple[str, ...] = ()
    part: tuple[int, int] = (1, 1)

    def arguments(self) -> list[str]:
        """Return the options as the command line takes them, without the part."""
        labels = ",".join(map(labels_text, self.labels))
        words = [f"--labels={labels}", f"--methods={','.join(self.methods)}"]
        words += [f"--seeds={self.seeds}"]
        words += [f"--init={self.init}"] if self.init else []
        words += [f"--vit-init={self.vit_init}"] if self.vit_init else []
        return words + [f"--set={setting}" for setting in self.settings]


@dataclasses.dataclass(frozen=True)
class TransferSetup:
    """What all cells share.

    Attributes:
        configs: recipe by method; run.url is the folder of the table.
        manifest: of the labeled set.
        table: without results.
    """

    configs: Mapping[str, Config]
    manifest: Manifest
    table: TransferTable

    @property
    def url(self) -> str:
        """Folder of the table."""
        return next(iter(self.configs.values())).run.url

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


def set_up_transfer(name: str, overrides: Sequence[str], options: TransferOptions) -> TransferSetup:
    """Check everything that can be wrong before hours of training, and return what cells share.

    Args:
        name: see `run`.
        overrides: see `run`.
        options: see `run`.

    Raises:
        SvfapError: As `run` does.
    """
    options = _checked(options)
    loader = _RecipeLoader(name, overrides)
    base = loader.load()
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
        method: _config_of(METHODS[method], loader, _settings_of(method, options), urls)
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
        command=shlex.join(["svfap", "bench", "transfer", name, *overrides, *options.arguments()]),
    )
    return TransferSetup(configs, manifest, table)


def _checked(options: TransferOptions) -> TransferOptions:
    """Return the options, with the pre-trained ViT beside the other one if it has weights."""
    for method in options.methods:
        if method not in METHODS:
            raise ConfigError("No such method", "--methods", method, nearest(method, METHODS))
    for setting in options.settings:
        method, colon, override = setting.partition(":")
        if not colon or "=" not in override:
            do = "write it as METHOD:KEY=VALUE, e.g. attentive:optim.lr=1e-2"
            raise ConfigError("Cannot read the setting of a method", "--set", setting, do)
        if method not in METHODS:
            raise ConfigError("No such method", "--set", setting, nearest(method, METHODS))
    number, parts = options.part
    if not 1 <= number <= parts:
        do = "write it as 1/2: the first of two"
        raise ConfigError("No such part", "--part", f"{number}/{parts}", do)
    methods = list(dict.fromkeys(options.methods))
    if options.vit_init and "vit" in methods and "vit-pretrained" not in methods:
        methods.insert(methods.index("vit") + 1, "vit-pretrained")
    labels = tuple(dict.fromkeys(options.labels))
    return dataclasses.replace(options, methods=tuple(methods), labels=labels)


def _settings_of(method: str, options: TransferOptions) -> list[str]:
    prefix = f"{method}:"
    return [s.removeprefix(prefix) for s in options.settings if s.startswith(prefix)]


class _RecipeLoader:
    """Loads the recipe with more overrides, and completes its task from the data, once each."""

    def __init__(self, name: str, overrides: Sequence[str]) -> None:
        self._name, self._overrides = name, [*_IN_PROCESS, *overrides]
        self._known: dict[tuple[str, ...], Config] = {}

    def load(self, more: Sequence[str] = ()) -> Config:
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
    method: Method, loader: _RecipeLoader, settings: Sequence[str], urls: Mapping[str, str]
) -> Config:
    """Return the recipe of a method: what it starts from, what it trains, and its encoder."""
    base, config = loader.load(), loader.load(settings)
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
    configs: Mapping[str, Config], manifest: Manifest, options: TransferOptions
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
