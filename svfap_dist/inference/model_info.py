"""What a network's weights do not say: which clips it takes, what its outputs mean, where it comes
from.

A card is read from whatever `load` is given. A checkpoint has it in its recipe. A folder made by
`svfap export` has it as config.json. A folder made by `svfap import` has in its config.json only
the arguments that build the network; the rest is then as the method has it, and can be overridden.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model.patches import IMAGENET_MEAN, IMAGENET_STD
from svfap_dist.model.sizes import Size
from svfap_dist.video.views import REGIONS, Region, region_name

FORMAT = "svfap-export-1"
Kind = Literal["features", "classification", "regression"]
Activation = Literal["none", "sigmoid", "tanh"]
_KINDS, _ACTIVATIONS = get_args(Kind), get_args(Activation)


@dataclasses.dataclass(frozen=True)
class Card:
    """How to use a network.

    build: arguments of `classifier.build`, or of `autoencoder.build` for a pre-trained network.
    num_frames, sampling_rate, frame_size: of a clip: frames, source frames from one to the next,
    pixels. region: the part of each frame that is looked at, as `data.region`.
    kind: features for a pre-trained network. names: of the outputs, in their order; empty: nobody
    said. activation: of a regression's outputs. test_segments, test_crops: windows and crops whose
    scores a prediction is the mean of.
    provenance: run, step, fingerprints of data and recipe, versions. licence: of the weights.
    """

    build: dict[str, Any]
    num_frames: int
    frame_size: int
    sampling_rate: int = 4  # arXiv 2401.00416; on FERV39k the authors take 1
    region: Region = "center"
    kind: Kind = "features"
    names: tuple[str, ...] = ()
    activation: Activation = "none"
    test_segments: int = 2
    test_crops: int = 2
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    licence: str = ""

    @property
    def window(self) -> int:
        """Source frames that a clip spans."""
        return (self.num_frames - 1) * self.sampling_rate + 1

    @property
    def num_outputs(self) -> int:
        """Scores of a clip; 0 for a pre-trained network."""
        return self.build.get("num_outputs", 0)

    def name_of(self, output: int) -> str:
        """What an output stands for: its name, or its number where nobody said."""
        return self.names[output] if self.names else str(output)

    def with_overrides(self, overrides: Mapping[str, Any]) -> Card:
        """The card with some of its fields as a user says.

        Raises: ConfigError for a field or value that cannot be.
        """
        given = dict(overrides)
        if "names" in given:
            given["names"] = tuple(given["names"])
        if "region" in given:
            given["region"] = region_name(given["region"])
        unknown = sorted(given.keys() - _OVERRIDABLE)
        if unknown:
            raise ConfigError(
                "No such thing to override",
                where=unknown[0],
                found=f"{unknown[0]} = {given[unknown[0]]!r}",
                do=f"known are {', '.join(sorted(_OVERRIDABLE))}",
            )
        card = dataclasses.replace(self, **given)
        card.check(where="override")
        return card

    def check(self, where: str) -> None:
        """Check that the fields can be, and fit the network.

        Raises: ConfigError.
        """
        rules = {
            "region": (self.region in REGIONS, f"use {', '.join(REGIONS)}"),
            "kind": (self._kind_fits(), f"the network has {self.num_outputs} outputs"),
            "activation": (self.activation in _ACTIVATIONS, f"use {', '.join(_ACTIVATIONS)}"),
            "names": (
                len(self.names) in (0, self.num_outputs),
                f"give a name for each of {self.num_outputs} outputs, or none",
            ),
            **{
                name: (getattr(self, name) > 0, "give a whole number greater than 0")
                for name in ("sampling_rate", "test_segments", "test_crops")
            },
        }
        for name, (fine, advice) in rules.items():
            if not fine:
                found = f"{name} = {getattr(self, name)!r}"
                raise ConfigError("Does not fit the network", where=where, found=found, do=advice)

    def _kind_fits(self) -> bool:
        return self.kind in _KINDS and (self.kind == "features") == (self.num_outputs == 0)


_OVERRIDABLE = frozenset(
    ("sampling_rate", "region", "kind", "names", "activation", "test_segments", "test_crops")
)


def of_import(build: dict[str, Any], size: Size) -> Card:
    """Card of a network of which only the arguments of `build` are known, and thereby its size."""
    kind = "classification" if "num_outputs" in build else "features"
    return Card(build, size.num_frames, size.frame_size, kind=kind)


def of_checkpoint(build: dict[str, Any], config: Config, state: TrainState) -> Card:
    """Card of a checkpoint, by its recipe and its train state."""
    provenance = {
        "run_url": config.run.url,
        "step": state.step,
        "clips_seen": state.clips_seen,
        "data_url": config.data.url,
        "data_fingerprint": state.manifest_fingerprint,
        "recipe_fingerprint": state.config_fingerprint,
        "versions": state.versions,
    }
    card = Card(
        build,
        num_frames=config.data.num_frames,
        frame_size=config.data.frame_size,
        sampling_rate=config.data.sampling_rate,
        region=region_name(config.data.region),
        provenance=provenance,
    )
    if "num_outputs" not in build:
        return card
    task, finetune = config.task, config.finetune
    assert task is not None, "whoever trains a classifier has a task"
    return dataclasses.replace(
        card,
        kind=task.kind,
        names=tuple(task.names),
        activation=finetune.output,
        test_segments=finetune.test_segments,
        test_crops=finetune.test_crops,
        provenance={
            **provenance,
            "set": task.set,
            "label": task.label,
            "fold": task.fold,
            "init": finetune.init,
        },
    )


def to_json(card: Card, *, weights: str) -> bytes:
    """config.json of an export whose weights are the file `weights`: complete enough to use the
    network without this program."""
    document = {
        "format": FORMAT,
        "weights": weights,
        "build": card.build,
        "preprocessing": {
            "num_frames": card.num_frames,
            "sampling_rate": card.sampling_rate,
            "region": card.region,
            "frame_size": card.frame_size,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "input": "float32 [batch, 3, num_frames, frame_size, frame_size] of RGB, "
            "(pixel / 255 - mean) / std",
        },
        "task": {"kind": card.kind, "names": card.names, "activation": card.activation},
        "testing": {"segments": card.test_segments, "crops": card.test_crops},
        "provenance": card.provenance,
        "licence": card.licence,
    }
    return (json.dumps(document, indent=1) + "\n").encode()


def from_json(data: bytes, where: str) -> Card | None:
    """The card that `to_json` wrote; None if it is the config.json of `svfap import`.

    Raises: CheckpointError if it is neither.
    """
    try:
        document = json.loads(data)
        if "format" not in document and "size" in document:
            return None
        if document["format"] != FORMAT:
            raise ValueError(f"format {document['format']}")
        clip, task, testing = (document[name] for name in ("preprocessing", "task", "testing"))
        card = Card(
            document["build"],
            **{name: clip[name] for name in _CLIP},
            region=region_name(clip["region"]),
            kind=task["kind"],
            names=tuple(task["names"]),
            activation=task["activation"],
            test_segments=testing["segments"],
            test_crops=testing["crops"],
            provenance=document["provenance"],
            licence=document["licence"],
        )
        card.check(where)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise CheckpointError(
            "Unreadable description of a network",
            where=where,
            found=str(error) if isinstance(error, ConfigError) else repr(error),
            do="export the network again",
        ) from error
    return card


_CLIP = ("num_frames", "sampling_rate", "frame_size")
