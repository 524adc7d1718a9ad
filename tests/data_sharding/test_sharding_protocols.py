"""Each set for fine-tuning from its layout to its protocol: sharded, labels read back from the
shards, folds selected by its recipe."""

from __future__ import annotations

import collections
import functools
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import LAYOUTS

from data_sharding import pipeline
from svfap_dist.config import Config, recipe
from svfap_dist.errors import ShardError
from svfap_dist.evaluate import protocol
from svfap_dist.shards import format as shard_format

# What the others extend, and what takes its task from the data.
_OTHERS = ("finetune_base", "finetune_custom")
RECIPES = [n for n in recipe.names() if n.startswith("finetune_") and n not in _OTHERS]
SYNTHETIC = "clips=42,identities=6,frames=2,size=64"
# Samples that each fold tests, of the small layouts; 0: the fixed split.
TESTED = {
    "dfew": {1: 4, 2: 4, 3: 4, 4: 4, 5: 4},
    "mafw": {1: 5, 2: 5, 3: 4, 4: 4, 5: 4},
    "ferv39k": {0: 2},
    "cremad": {1: 37, 2: 36, 3: 36, 4: 36, 5: 38},
    "ravdess": dict.fromkeys(range(1, 7), 32),
    "enterface05": {1: 54, 2: 54, 3: 54, 4: 54, 5: 42},
    "werewolfxl": dict.fromkeys(range(1, 6), 12),
    "avcaffe": {0: 8},
    "daisee": {0: 2},
    "afewva": dict.fromkeys(range(1, 6), 2),
    "mead": dict.fromkeys(range(1, 6), 16),
    "celebvhq": dict.fromkeys(range(1, 6), 2),
    "firstimpressions": {0: 1},
    "synthetic": {1: 14, 2: 7, 3: 7, 4: 7, 5: 7},
}
TRAINED_ON = {
    "ferv39k": 3,
    "avcaffe": 12,
    "daisee": 3,
    "firstimpressions": 2,
}  # else: all that are not tested


def task_of(name: str) -> tuple[Config, Any]:
    config = recipe.load(name, ["task.fold=0"])
    assert config.task is not None
    return config, config.task


@pytest.fixture(scope="module")
def labels_of(roots: dict[str, Path], tmp_path_factory: pytest.TempPathFactory):
    """Labels of all samples of a set, as its shards' indexes have them; sharded once."""

    @functools.cache
    def read(name: str) -> list[dict[str, Any]]:
        url = str(tmp_path_factory.mktemp(f"{name}-shards"))
        text = SYNTHETIC if name == "synthetic" else str(roots[name])
        summary = pipeline.shard(name, text, url, min_frames=1, max_samples_per_shard=40, workers=0)
        assert not summary.rejected
        labels: list[dict[str, Any]] = []
        for entry in shard_format.load_manifest(url).shards:
            index = shard_format.load_index(url, entry)
            assert list(index.labels) == in_tar(Path(url, entry.name))
            labels += index.labels
        return labels

    return read


def in_tar(path: Path) -> list[dict[str, Any]]:
    with tarfile.open(path) as tar:
        files = [tar.extractfile(member) for member in tar if member.name.endswith(".json")]
        return [json.load(file)["labels"] for file in files if file]


def test_every_set_has_a_recipe():
    sets = {task_of(name)[1].set for name in RECIPES}
    assert sets == LAYOUTS.keys() | {"synthetic"}
    dimensions = {task_of(name)[1].label for name in RECIPES if "avcaffe" in name}
    assert dimensions == {"classes.arousal", "classes.valence"}


@pytest.mark.parametrize("name", RECIPES)
def test_protocol_of_a_set(name: str, labels_of: Callable[[str], list[dict[str, Any]]]):
    _, task = task_of(name)
    labels = labels_of(task.set)
    tested = collections.Counter[int]()
    for fold in protocol.folds_of(task):
        train, test = protocol.select(task, labels, fold)
        assert len(test) == TESTED[task.set][fold]
        assert len(train) == TRAINED_ON.get(task.set, len(labels) - len(test))
        assert not set(train) & set(test)
        people = [{labels[n].get("subject") for n in side} for side in (train, test)]
        assert people[0] & people[1] <= {None}
        assert task.subject_independent == (None not in people[0] | people[1])
        tested.update(test.tolist())
        targets = protocol.targets(task, [labels[n] for n in test])
        if task.kind == "regression":
            assert targets.shape == (len(test), len(task.names))
            assert np.allclose(targets[:, 0], [labels[n]["values"][task.names[0]] for n in test])
        else:
            assert set(targets.tolist()) <= set(range(len(task.names)))
    assert protocol.folds_of(task) == tuple(TESTED[task.set])
    assert set(tested.values()) == {1}
    if task.folds:
        assert len(tested) == len(labels)


def test_a_recipe_refuses_the_shards_of_another_set(labels_of):
    _, task = task_of("finetune_dfew")
    with pytest.raises(ShardError, match=r"task\.set = dfew, samples of ferv39k"):
        protocol.select(task, labels_of("ferv39k"), 1)


PAPERS = {  # as in the released code's own tables
    "dfew": (("uar", 62.83), ("war", 74.27)),
    "ferv39k": (("uar", 42.14), ("war", 52.29)),
    "mafw": (("uar", 41.19), ("war", 54.28)),
}


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "finetune_synthetic"])
def test_recipe_is_the_released_codes(name: str):
    """Numbers of the method, which no other test checks."""
    config, task = task_of(name)
    data, optim, finetune, augment = config.data, config.optim, config.finetune, config.augment
    assert (data.num_frames, data.frame_size, config.model.size) == (16, 160, "base")
    assert data.sampling_rate == (1 if task.set == "ferv39k" else 4)
    assert (optim.lr, optim.min_lr, optim.warmup_lr) == (1e-3, 1e-6, 1e-6)
    assert (optim.betas, optim.weight_decay, optim.clip_grad_norm) == ((0.9, 0.999), 0.05, 0.0)
    assert (config.train.epochs, optim.warmup_fraction * config.train.epochs) == (100, 5)
    assert config.train.global_batch_size == 64
    assert (finetune.mode, finetune.layer_decay, finetune.drop_path) == ("full", 0.75, 0.1)
    assert (finetune.test_segments, finetune.test_crops) == (2, 2)
    assert finetune.head_init_scale == 0.001
    mixing = (finetune.label_smoothing, finetune.mixup, finetune.cutmix)
    assert mixing == ((0.1, 0.8, 1.0) if task.kind == "classification" else (0, 0, 0))
    ops = (augment.rand_augment_ops, augment.rand_augment_magnitude, augment.rand_augment_std)
    assert ops == (4, 7, 0.5)
    assert (augment.flip, augment.erasing) == (0.5, 0.25)
    assert tuple(zip(task.metrics, task.published, strict=False)) == PAPERS.get(task.set, ())
    assert bool(task.published) == bool(task.published_source)
