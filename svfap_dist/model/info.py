"""The description of a network beyond its weights: how to build it, feed it and read its outputs.

`ModelInfo` is written as one JSON document, in the metadata of model.safetensors by runs, imports
and exports alike, and for other programs as config.json beside it by imports and exports.
`weights.load_any` reads it back. Files of earlier versions lack it: `inference.load` then derives
it from what they have.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from svfap_dist.config import Config
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model.patches import IMAGENET_MEAN, IMAGENET_STD
from svfap_dist.model.sizes import Size
from svfap_dist.video.views import REGIONS, Region, region_name

_FORMAT = "svfap-export-1"
Kind = Literal["features", "classification", "regression"]
Activation = Literal["none", "sigmoid", "tanh"]
_KINDS, _ACTIVATIONS = get_args(Kind), get_args(Activation)
_CLIP = ("num_frames", "sampling_rate", "region", "frame_size")
_OVERRIDABLE = frozenset(
    ("sampling_rate", "region", "kind", "names", "activation", "test_segments", "test_crops")
)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """How to use a network.

    build: arguments of `classifier.build`, or of `autoencoder.build` for a pre-trained network.
    num_frames, sampling_rate, frame_size: of a clip: frames, source frames from one to the next,
    pixels. region: the part of each frame that is used, as `data.region`.
    kind: features for a pre-trained network. names: of the outputs, in order; empty: unknown.
    activation: of a regression's outputs. test_segments, test_crops: windows and crops whose scores
    a prediction averages.
    provenance: run, step, fingerprints of data and recipe, versions. license: of the weights.
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
    license: str = ""

    @property
    def window(self) -> int:
        """Source frames that a clip spans."""
        return (self.num_frames - 1) * self.sampling_rate + 1

    @property
    def num_outputs(self) -> int:
        """Scores of a clip; 0 for a pre-trained network."""
        return self.build.get("num_outputs", 0)

    def name_of(self, output: int) -> str:
        """Return the name of an output, or its number where names are unknown.

        Args:
            output: index of the output.
        """
        return self.names[output] if self.names else str(output)

    @classmethod
    def of_build(cls, build: dict[str, Any], size: Size) -> ModelInfo:
        """Return the description of a network of which only the architecture is known.

        Args:
            build: arguments of `build`.
            size: the dimensions that they mean.
        """
        kind = "classification" if "num_outputs" in build else "features"
        return cls(build, size.num_frames, size.frame_size, kind=kind)

    @classmethod
    def of_run(
        cls, build: Mapping[str, Any], config: Config, provenance: dict[str, Any]
    ) -> ModelInfo:
        """Return the description of a network in training.

        Args:
            build: arguments of `build`.
            config: the recipe of the run.
            provenance: step and fingerprints; the recipe's URLs are added.
        """
        data, task, finetune = config.data, config.task, config.finetune
        clip = {name: getattr(data, name) for name in _CLIP}
        clip["region"] = region_name(data.region)
        provenance = {"run_url": config.run.url, "data_url": data.url, **provenance}
        if task is None:
            return cls(dict(build), **clip, provenance=provenance)
        names = {"set": task.set, "label": task.label, "fold": task.fold, "init": finetune.init}
        return cls(
            dict(build),
            **clip,
            kind=task.kind,
            names=task.names,
            activation=finetune.output if task.kind == "regression" else "none",
            test_segments=finetune.test_segments,
            test_crops=finetune.test_crops,
            provenance={**provenance, **names},
        )

    def with_overrides(self, overrides: Mapping[str, Any]) -> ModelInfo:
        """Return the description with some fields replaced.

        Args:
            overrides: values by field.

        Raises:
            ConfigError: A field cannot be replaced, or a value does not fit the network.
        """
        given = dict(overrides)
        if "names" in given:
            given["names"] = tuple(given["names"])
        if "region" in given:
            given["region"] = region_name(given["region"])
        unknown = sorted(given.keys() - _OVERRIDABLE)
        if unknown:
            raise ConfigError(
                "Unknown override",
                where=unknown[0],
                found=f"{unknown[0]} = {given[unknown[0]]!r}",
                do=f"known are {', '.join(sorted(_OVERRIDABLE))}",
            )
        info = dataclasses.replace(self, **given)
        info._check(where="override")
        return info

    def _check(self, where: str) -> None:
        """Check that the fields are possible, and fit the network."""
        is_kind = self.kind in _KINDS and (self.kind == "features") == (self.num_outputs == 0)
        rules = {
            "region": (self.region in REGIONS, f"use {', '.join(REGIONS)}"),
            "kind": (is_kind, f"the network has {self.num_outputs} outputs"),
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
        for name, (fits, advice) in rules.items():
            if not fits:
                found = f"{name} = {getattr(self, name)!r}"
                raise ConfigError("Does not fit the network", where=where, found=found, do=advice)

    def to_json(self, weights: str) -> bytes:
        """Return the document, which is enough to use the network without this program.

        Args:
            weights: name of the file of weights.
        """
        document = {
            "format": _FORMAT,
            "weights": weights,
            "build": self.build,
            "preprocessing": {
                **{name: getattr(self, name) for name in _CLIP},
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "input": "float32 [batch, 3, num_frames, frame_size, frame_size] of RGB, "
                "(pixel / 255 - mean) / std",
            },
            "task": {"kind": self.kind, "names": self.names, "activation": self.activation},
            "testing": {"segments": self.test_segments, "crops": self.test_crops},
            "provenance": self.provenance,
            "licence": self.license,  # spelled as in the files of the first version
        }
        return (json.dumps(document, indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes | str, where: str) -> ModelInfo | None:
        """Return the description that `to_json` wrote; None for an import of earlier versions.

        Args:
            data: the document.
            where: its URL, for messages.

        Raises:
            CheckpointError: It is neither.
        """
        try:
            document = json.loads(data)
            if "format" not in document and "size" in document:  # the arguments of `build` alone
                return None
            if document["format"] != _FORMAT:
                raise ValueError(f"format {document['format']}")
            clip, task, testing = (document[name] for name in ("preprocessing", "task", "testing"))
            clip["region"] = region_name(clip["region"])
            info = cls(
                document["build"],
                **{name: clip[name] for name in _CLIP},
                kind=task["kind"],
                names=tuple(task["names"]),
                activation=task["activation"],
                test_segments=testing["segments"],
                test_crops=testing["crops"],
                provenance=document["provenance"],
                license=document["licence"],
            )
            info._check(where)
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise CheckpointError(
                "Unreadable description of a network",
                where=where,
                found=str(error) if isinstance(error, ConfigError) else repr(error),
                do="export the network again",
            ) from error
        return info
