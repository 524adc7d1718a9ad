"""Weights as one safetensors file that also says how to build their model.

The file's metadata has the arguments of `autoencoder.build` as JSON, or those of `classifier.build`
(they include num_outputs), so one file is enough to restore a model: no recipe, no DeepSpeed, no
pickle. It also has the network's `ModelInfo`, unless an earlier version wrote it. Paths may be
URLs.
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
_MAX_HEADER_BYTES = 100 << 20  # the format's limit


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
        raise CheckpointError(
            "Build arguments cannot be saved",
            where=path,
            found=str(error),
            do="give plain numbers, strings and lists",
        ) from error
    if "size" not in build_args:
        raise CheckpointError("Build arguments have no model size", path, build, "add size")
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
        CheckpointError: the file is missing, damaged, or was not written by `save`.
    """
    try:
        data = storage.read_bytes(path)
        state = safetensors.torch.load(data)
    except storage.StorageMissingError as error:
        raise _missing(path) from error
    except safetensors.SafetensorError as error:
        raise _damaged(path, str(error)) from error
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
    return _parse_build(_parse_metadata(data[_LENGTH_BYTES:end], path), path), state


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
    """Return the classifier of a file that `save` wrote, in eval mode, on the CPU.

    Args:
        path: path or URL.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights fit no classifier.
    """
    return _build_model(path, classifier.build, *load(path))


def load_any(
    path: str,
) -> tuple[dict[str, Any], autoencoder.MaskedAutoencoder | classifier.Classifier]:
    """Return the arguments of `build` and the network of a file that `save` wrote.

    Args:
        path: path or URL.

    Returns:
        The arguments, which have num_outputs if the network is a classifier; the network in eval
        mode, on the CPU.

    Raises:
        CheckpointError: the file is missing or damaged, or its weights do not fit.
    """
    build_args, state = load(path)
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
        raise CheckpointError(
            "Weights do not fit the model that their file describes",
            where=path,
            found=str(error),
            do="export them again",
        ) from error
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Imported:
    """Released weights that were written in our format."""

    weights_url: str
    build: dict[str, Any]
    parameters: int

    def lines(self) -> list[str]:
        """Return the result as text."""
        kind = "classifier" if "num_outputs" in self.build else "autoencoder"
        return [
            f"{self.weights_url}: {kind}, {self.parameters:,} parameters",
            *(f"  {name} = {value}" for name, value in self.build.items()),
        ]


def import_file(path: str, folder: str, overrides: Mapping[str, Any]) -> Imported:
    """Convert a released `.pth` file to model.safetensors and config.json, the same description.

    Args:
        path: the file, a path or URL.
        folder: where to write, a path or URL.
        overrides: as in `import_official`.

    Raises:
        CheckpointError: the file does not have the weights of a known network.
        ConfigError: the overrides do not fit.
        StorageError: reading or writing fails.
    """
    build, state = import_official(read_pth(path), **overrides)
    url = storage.join(folder, WEIGHTS)
    size = {name: value for name, value in build.items() if name not in ("size", "num_outputs")}
    info = ModelInfo.of_build(build, sizes.resolve(build["size"], size))
    save(url, state, build, info)
    storage.write_bytes(storage.join(folder, BUILD), info.to_json(WEIGHTS))
    return Imported(url, build, sum(value.numel() for value in state.values()))
