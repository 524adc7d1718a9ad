"""Weights as one safetensors file that also describes its network.

The file's metadata has the arguments of `autoencoder.build` as JSON, or those of `classifier.build`
(they include num_outputs), so one file is enough to restore a model: no recipe, no DeepSpeed, no
pickle. It also has a `ModelInfo`: how to feed the network and read its outputs. Runs, imports and
exports write this one JSON document alike; imports and exports also write it as config.json beside
the weights, for other programs. `load_any` reads it back. Files of earlier versions lack it:
`inference.load` then derives it from what they have. Paths may be URLs.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar, get_args

import safetensors
import safetensors.torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.config import Config
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import autoencoder, classifier, lora
from svfap_dist.model.convert import import_official, read_pth
from svfap_dist.model.patches import IMAGENET_MEAN, IMAGENET_STD
from svfap_dist.model.sizes import Size, size_of_build
from svfap_dist.video.info import REGIONS, Region, region_name

log = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS, BUILD = "model.safetensors", "config.json"  # files of an imported network
_BUILD_KEY, _INFO_KEY = "svfap_dist.build", "svfap_dist.info"
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, little-endian
_MAX_HEADER_BYTES = 100 << 20  # the format's limit
_FORMAT = "svfap-export-1"
Kind = Literal["features", "classification", "regression"]
Activation = Literal["none", "sigmoid", "tanh"]
_KINDS, _ACTIVATIONS = get_args(Kind), get_args(Activation)
# Of released weights, by encoder. VideoMAE's license is of code and weights alike; SVFAP's
# repository says nothing about its weights.
_LICENSES = {"vit": "CC-BY-NC-4.0"}
_CLIP = ("num_frames", "sampling_rate", "region", "frame_size")
_OVERRIDABLE = frozenset(
    ("sampling_rate", "region", "kind", "names", "activation", "test_segments", "test_crops")
)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """How to use a network.

    A prediction is the mean over `test_segments` windows times `test_crops` crops of a video.
    """

    build: dict[str, Any]  # arguments of `classifier.build`, or `autoencoder.build` if pre-trained
    num_frames: int  # of a clip
    frame_size: int  # pixels, height and width
    # Source frames from one frame of a clip to the next (arXiv 2401.00416; 1 on FERV39k).
    sampling_rate: int = 4
    region: Region = "center"  # part of each frame that is used, as `data.region`
    kind: Kind = "features"  # features: a pre-trained network
    names: tuple[str, ...] = ()  # of the outputs, in order; empty: unknown
    activation: Activation = "none"  # of a regression's outputs
    test_segments: int = 2
    test_crops: int = 2
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)  # run, step, versions, ...
    license: str = ""  # of the weights

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
        cls,
        build: Mapping[str, Any],
        config: Config,
        provenance: dict[str, Any],
        license: str = "",
    ) -> ModelInfo:
        """Return the description of a network in training.

        Args:
            build: arguments of `build`.
            config: the recipe of the run.
            provenance: step and fingerprints; the recipe's URLs are added.
            license: of the weights that it was fine-tuned from; empty: unknown.
        """
        data, task, finetune = config.data, config.task, config.finetune
        clip = {name: getattr(data, name) for name in _CLIP}
        provenance = {"run_url": config.run.url, "data_url": ", ".join(data.urls), **provenance}
        if task is None:
            return cls(dict(build), **clip, provenance=provenance)
        assert task.kind != "auto"  # decided from the data before a network is built
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
            license=license,
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
            if given["region"] == "centre":
                log.warning("region centre is now called center; the old name still works")
            given["region"] = region_name(given["region"])
        unknown = sorted(given.keys() - _OVERRIDABLE)
        if unknown:
            raise ConfigError(
                "Unknown override",
                where=unknown[0],
                found=f"{unknown[0]} = {given[unknown[0]]!r}",
                do=f"use one of {', '.join(sorted(_OVERRIDABLE))}",
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


def save(
    path: str,
    state_dict: Mapping[str, Tensor],
    build_args: Mapping[str, Any],
    info: ModelInfo | None = None,
) -> None:
    """Write weights, the arguments of `build`, and the description of the network.

    Args:
        path: path or URL.
        state_dict: the weights.
        build_args: arguments of `build`: `size` and its overrides.
        info: how to use the network; None: only `build_args` are known.

    Raises:
        CheckpointError: the arguments have no size or cannot be written as JSON.
    """
    try:
        build = json.dumps(dict(build_args), sort_keys=True)
    except TypeError as error:
        advice = "give plain numbers, strings and lists"
        raise CheckpointError(
            "Build arguments cannot be saved", path, str(error), advice
        ) from error
    if "size" not in build_args:
        title, do = "Build arguments have no model size", "add size, the name of a model size"
        raise CheckpointError(title, path, build, do)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    metadata = {_BUILD_KEY: build}
    if info is not None:
        metadata[_INFO_KEY] = info.to_json(path.rpartition("/")[2]).decode()
    storage.write_bytes(path, safetensors.torch.save(tensors, metadata))


def load(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments of `build` and the weights of a file that `save` wrote.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file is missing, damaged, was not written by `save`, or has a value
            that is not finite.
    """
    try:
        data = storage.read_bytes(path)
        state = safetensors.torch.load(data)
    except storage.StorageMissingError as error:
        raise _missing(path) from error
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from error
    _check_finite(path, state)
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return _parse_build(_parse_metadata(data[_LENGTH_BYTES:end], path), path), state


def _check_finite(path: str, state: Mapping[str, Tensor]) -> None:
    broken = [
        name
        for name, value in state.items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            "Weights are not finite",
            where=path,
            found=f"NaN or infinite values in {len(broken)} of {len(state)} tensors, such as "
            f"{broken[0]}",
            do="use an earlier checkpoint, or get the weights again",
        )


def load_build(path: str) -> dict[str, Any]:
    """Return the arguments of `build` of a file that `save` wrote, without reading its weights.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file is missing, damaged, or was not written by `save`.
    """
    return _parse_build(_read_metadata(path), path)


def load_info(path: str) -> ModelInfo | None:
    """Return the description of a network, without reading its weights.

    Args:
        path: a file that `save` wrote.

    Returns:
        None where an earlier version wrote the file, without a description.

    Raises:
        CheckpointError: the file is missing, or its description is damaged.
    """
    document = _read_metadata(path).get(_INFO_KEY)
    return None if document is None else ModelInfo.from_json(document, path)


def _read_metadata(path: str) -> dict[str, str]:
    try:
        length = storage.read_range(path, 0, _LENGTH_BYTES)
        end = _LENGTH_BYTES + min(int.from_bytes(length, "little"), _MAX_HEADER_BYTES)
        header = storage.read_range(path, _LENGTH_BYTES, end)
    except storage.StorageMissingError as error:
        raise _missing(path) from error
    return _parse_metadata(header, path)


def _missing(path: str) -> CheckpointError:
    return CheckpointError("No weights", path, "no such file", "check the path")


def _damaged(path: str, found: str) -> CheckpointError:
    return CheckpointError(
        "Weights are damaged or not a safetensors file", path, found, "export them again"
    )


def _parse_metadata(header: bytes, path: str) -> dict[str, str]:
    try:
        return json.loads(header).get("__metadata__", {})
    except ValueError as error:
        raise _damaged(path, "its header is not JSON") from error


def _parse_build(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    build = metadata.get(_BUILD_KEY)
    if build is None:
        raise CheckpointError(
            "Weights without a description of their model",
            where=path,
            found=f"no {_BUILD_KEY} in the file's metadata",
            do="use a file written by this program",
        )
    return json.loads(build)


def load_autoencoder(path: str) -> autoencoder.MaskedAutoencoder:
    """Return the autoencoder of a file that `save` wrote, in eval mode, on the CPU.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights fit no autoencoder.
    """
    return _build_model(path, autoencoder.build, *load(path))


def load_classifier(path: str) -> classifier.Classifier:
    """Return the classifier of a file that `save` wrote, adapters merged, in eval mode, on the CPU.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights fit no classifier.
    """
    return _build_model(path, classifier.build, *lora.merged(*load(path)))


def load_any(
    path: str,
) -> tuple[dict[str, Any], autoencoder.MaskedAutoencoder | classifier.Classifier]:
    """Return the arguments of `build` and the network of a file that `save` wrote.

    Args:
        path: path or URL.

    Returns:
        The arguments, which have num_outputs if the network is a classifier; the network in eval
        mode, on the CPU. Adapters are merged into its weights.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights do not fit.
    """
    build_args, state = lora.merged(*load(path))
    build = classifier.build if "num_outputs" in build_args else autoencoder.build
    return build_args, _build_model(path, build, build_args, state)


def _build_model(
    path: str,
    build: Callable[..., Model],
    build_args: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> Model:
    try:
        model = build(**build_args)
        model.load_state_dict(state)
    except (ConfigError, RuntimeError, TypeError) as error:
        what = "Weights do not fit the model that their file describes"
        raise CheckpointError(what, path, str(error), "export them again") from error
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Imported:
    """Released weights that were written in our format."""

    weights_url: str
    build: dict[str, Any]
    parameters: int
    license: str = ""

    def lines(self) -> list[str]:
        """Return the result as text."""
        kind = "classifier" if "num_outputs" in self.build else "autoencoder"
        return [
            f"{self.weights_url}: {kind}, {self.parameters:,} parameters",
            *(f"  {name} = {value}" for name, value in self.build.items()),
            f"License: {self.license or 'not stated by the authors'}",
        ]


def import_file(
    path: str, folder: str, overrides: Mapping[str, Any], license: str = ""
) -> Imported:
    """Convert a released `.pth` file to model.safetensors and config.json, the same description.

    Args:
        path: the file, a path or URL.
        folder: where to write, a path or URL.
        overrides: as in `import_official`.
        license: of the weights; empty: that of the network's authors.

    Raises:
        CheckpointError: the file does not have the weights of a known network.
        ConfigError: the overrides do not fit.
        StorageError: reading or writing fails.
    """
    build, state = import_official(read_pth(path), **overrides)
    _check_finite(path, state)
    url = storage.join(folder, WEIGHTS)
    info = ModelInfo.of_build(build, size_of_build(build))
    license = license or _LICENSES.get(build.get("encoder", ""), "")
    info = dataclasses.replace(info, license=license)
    save(url, state, build, info)
    storage.write_bytes(storage.join(folder, BUILD), info.to_json(WEIGHTS))
    return Imported(url, build, sum(value.numel() for value in state.values()), license)
