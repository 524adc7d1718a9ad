"""The two sides of a task: which samples of the data set are trained on, which are tested.

Here the protocol (`downstream`), which knows labels, meets the data plane, which knows positions.
"""

from __future__ import annotations

import dataclasses

from svfap_dist.config import Config
from svfap_dist.data.selection import Selection, labels_of
from svfap_dist.evaluate import protocol
from svfap_dist.shards.format import Manifest


@dataclasses.dataclass(frozen=True)
class Sides:
    """Samples and their targets."""

    train: Selection
    test: Selection


def sides(config: Config, manifest: Manifest) -> Sides:
    """The sides of the recipe's fold (`task.fold`) or fixed split.

    Raises: ConfigError or ShardError if the recipe and the labels do not fit; StorageError.
    """
    assert config.task is not None
    labels = labels_of(config.data.url, manifest)
    chosen = protocol.select(config.task, labels, config.task.fold, config.run.seed)
    train, test = (
        Selection(positions, protocol.targets(config.task, [labels[p] for p in positions]))
        for positions in chosen
    )
    return Sides(train, test)
