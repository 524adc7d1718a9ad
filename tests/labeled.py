"""Little labeled data sets: the target of each sample names it, as its frames do."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from loaders import config_of
from numbered_shards import FRAMES, SIDE

from svfap_dist.config import AugmentConfig, Config, FinetuneConfig, TaskConfig
from svfap_dist.data.selection import Selection
from svfap_dist.video.info import VideoInfo

CLASSES = TaskConfig(
    kind="classification", set="painted", label="class", names=("one", "other"), metrics=("uar",)
)
THREE = CLASSES.model_copy(update={"names": ("first", "second", "third")})
UNCHANGED = AugmentConfig(flip=0.0, rand_augment_ops=0, erasing=0.0)
INFO = VideoInfo(FRAMES, 25.0, SIDE, SIDE, "h264")


def task_config(augment: AugmentConfig = UNCHANGED, **data) -> Config:
    """A task, whose clips are whole frames, not augmented by default."""
    return config_of(**data).model_copy(update={"task": CLASSES, "augment": augment})


def balanced(config: Config) -> Config:
    """A recipe's task of three classes that are balanced."""
    finetune = FinetuneConfig(sampling="balanced")
    return config.model_copy(update={"task": THREE, "finetune": finetune})


def target_of(sample: int) -> int:
    return 1000 + 7 * sample


def selection_of(samples: Iterable[int]) -> Selection:
    indices = np.array(sorted(samples), np.int64)
    return Selection(indices, np.array([target_of(int(i)) for i in indices], np.int64))
