"""Weights as one safetensors file that says how to build the model they belong to.

The file's metadata carries the arguments of `autoencoder.build` as JSON, or those of
`classifier.build` (they include num_outputs), so a file is enough to get a model back: no recipe,
no DeepSpeed, no pickle. Files are read and written through `storage`, so a path may be a URL.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import safetensors
import safetensors.torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import autoencoder, classifier, sizes
from svfap_dist.model.convert import import_official, read_pth
from svfap_dist.model.info import ModelInfo

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS, BUILD = "model.safetensors", "config.json"  # files of an imported network
_BUILD_KEY, _INFO_KEY = "svfap_dist.build", "svfap_dist.info"
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, little-endian
_LONGEST_HEADER = 100 << 20  # that the format allows


def save(
    path: str,
    state_dict: Mapping[str, Tensor],
    build_args: Mapping[str, Any],
    info: ModelInfo | None = None,
) -> None:
    """Write weights with the arguments of `build` and the description of the network.

    Args:
        path: path or URL of the file.
        state_dict: the weights.
        build_args: `size` and its overrides.
        info: how to use the network; None: only `build_args` are known.

    Raises:
        CheckpointError: The arguments name no size or cannot be written as JSON.
    """
    try:
        build = json.dumps(dict(build_args), sort_keys=True)
    except TypeError as error:
        raise CheckpointError(
            "Build arguments cannot be saved",
            where=path,
            found=str(error),
            do="give plain numbers, strings and lists",
        ) from error
    if "size" not in build_args:
        raise CheckpointError(
            "Build arguments lack the model's size", where=path, found=build, do="add size"
        )
    tensors = {name: value.detach().cpu().contiguous() for name, value in state_dict.items()}
    metadata = {_BUILD_KEY: build}
    if info is not None:
        metadata[_INFO_KEY] = info.to_json(path.rpartition("/")[2]).decode()
    storage.write_bytes(path, safetensors.torch.save(tensors, metadata))


def load(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `build` and state of a file that `save` wrote.

    Raises: CheckpointError if there is no such file or it is not one of ours.
    """
    try:
        data = storage.read_bytes(path)
    except storage.StorageMissingError as error:
        raise _no_weights(path) from error
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            "Weights are damaged or not a safetensors file",
            where=path,
            found=str(error),
            do="export them again",
        ) from error
    start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return _build_of(_metadata(data[_LENGTH_BYTES:start], path), path), state


def load_build(path: str) -> dict[str, Any]:
    """Arguments of `build` of a file that `save` wrote, without reading its weights.

    Raises: CheckpointError if they are not there.
    """
    return _build_of(_read_metadata(path), path)


def load_info(path: str) -> ModelInfo | None:
    """Return the description of a network, without reading its weights.

    Args:
        path: a file that `save` wrote.

    Returns:
        None where an earlier version wrote the file, without a description.

    Raises:
        CheckpointError: There is no such file, or its description is damaged.
    """
    document = _read_metadata(path).get(_INFO_KEY)
    return None if document is None else ModelInfo.from_json(document, path)


def _read_metadata(path: str) -> dict[str, str]:
    try:
        length = storage.read_range(path, 0, _LENGTH_BYTES)
        end = _LENGTH_BYTES + min(int.from_bytes(length, "little"), _LONGEST_HEADER)
        header = storage.read_range(path, _LENGTH_BYTES, end)
    except storage.StorageMissingError as error:
        raise _no_weights(path) from error
    return _metadata(header, path)


def _no_weights(path: str) -> CheckpointError:
    return CheckpointError("No weights", where=path, found="no such file", do="check the path")


def _metadata(header: bytes, path: str) -> dict[str, str]:
    try:
        return json.loads(header).get("__metadata__", {})
    except ValueError as error:
        raise CheckpointError(
            "Weights are damaged or not a safetensors file",
            where=path,
            found="its header is no JSON",
            do="export them again",
        ) from error


def _build_of(metadata: Mapping[str, str], path: str) -> dict[str, Any]:
    build = metadata.get(_BUILD_KEY)
    if build is None:
        raise CheckpointError(
            "Weights do not say how to build their model",
            where=path,
            found=f"no {_BUILD_KEY} in the file's metadata",
            do="use a file written by this program",
        )
    return json.loads(build)


def load_autoencoder(path: str) -> autoencoder.MaskedAutoencoder:
    """The autoencoder of a file that `save` wrote, in eval mode, on the CPU.

    Raises: CheckpointError if the file is missing, damaged, or its weights fit no autoencoder.
    """
    return _load_model(path, autoencoder.build)


def load_classifier(path: str) -> classifier.Classifier:
    """The classifier of a file that `save` wrote, in eval mode, on the CPU.

    Raises: CheckpointError if the file is missing, damaged, or its weights fit no classifier.
    """
    return _load_model(path, classifier.build)


def load_any(
    path: str,
) -> tuple[dict[str, Any], autoencoder.MaskedAutoencoder | classifier.Classifier]:
    """The arguments of `build` and the network of a file that `save` wrote, whichever it is; in
    eval mode, on the CPU.

    Raises: CheckpointError if the file is missing, damaged, or its weights do not fit.
    """
    build_args, state = load(path)
    build = classifier.build if "num_outputs" in build_args else autoencoder.build
    return build_args, _fitted(path, build, build_args, state)


def _load_model(path: str, build: Callable[..., Model]) -> Model:
    return _fitted(path, build, *load(path))


def _fitted(
    path: str,
    build: Callable[..., Model],
    build_args: Mapping[str, Any],
    state: Mapping[str, Tensor],
) -> Model:
    try:
        model = build(**build_args)
        model.load_state_dict(state)
    except (ConfigError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            "Weights do not fit the model that their file describes",
            where=path,
            found=str(error),
            do="export them again",
        ) from error
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Imported:
    """Released weights in our format."""

    weights_url: str
    build: dict[str, Any]
    parameters: int

    def lines(self) -> list[str]:
        """For people."""
        kind = "classifier" if "num_outputs" in self.build else "autoencoder"
        return [
            f"{self.weights_url}: {kind}, {self.parameters:,} parameters",
            *(f"  {name} = {value}" for name, value in self.build.items()),
        ]


def import_file(path: str, folder: str, overrides: Mapping[str, Any]) -> Imported:
    """Write a released `.pth` file as `folder`/model.safetensors, and its arguments of `build` as
    config.json beside it; `overrides` as in `import_official`.

    Raises: CheckpointError, ConfigError as `import_official`; StorageError.
    """
    build, state = import_official(read_pth(path), **overrides)
    url = storage.join(folder, WEIGHTS)
    size = {name: value for name, value in build.items() if name not in ("size", "num_outputs")}
    info = ModelInfo.of_build(build, sizes.resolve(build["size"], size))
    save(url, state, build, info)
    storage.write_bytes(storage.join(folder, BUILD), info.to_json(WEIGHTS))
    return Imported(url, build, sum(value.numel() for value in state.values()))
