"""Weights as one safetensors file that says how to build the model they belong to.

The file's metadata carries the arguments of `autoencoder.build` as JSON, so a file is enough to get
a model back: no recipe, no DeepSpeed, no pickle. Files are read and written through `storage`, so a
path may be a URL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from svfap_dist import storage
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import autoencoder

_BUILD_KEY = "svfap_dist.build"
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header, little-endian


def save(path: str, state_dict: Mapping[str, Tensor], build_args: Mapping[str, Any]) -> None:
    """Write weights with the arguments of `build` (`size` and its overrides).

    Raises: CheckpointError if the arguments name no size or cannot be written as JSON.
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
    storage.write_bytes(path, safetensors.torch.save(tensors, {_BUILD_KEY: build}))


def load(path: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of `build` and state of a file that `save` wrote.

    Raises: CheckpointError if there is no such file or it is not one of ours.
    """
    try:
        data = storage.read_bytes(path)
    except storage.StorageMissing as error:
        raise CheckpointError(
            "No weights", where=path, found="no such file", do="check the path"
        ) from error
    try:
        state = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(
            "Weights are damaged or not a safetensors file",
            where=path,
            found=str(error),
            do="export them again",
        ) from error
    header = json.loads(data[_LENGTH_BYTES:][: int.from_bytes(data[:_LENGTH_BYTES], "little")])
    build = header.get("__metadata__", {}).get(_BUILD_KEY)
    if build is None:
        raise CheckpointError(
            "Weights do not say how to build their model",
            where=path,
            found=f"no {_BUILD_KEY} in the file's metadata",
            do="use a file written by this program",
        )
    return json.loads(build), state


def load_autoencoder(path: str) -> autoencoder.MaskedAutoencoder:
    """The autoencoder of a file that `save` wrote, in eval mode, on the CPU.

    Raises: CheckpointError if the file is missing, damaged, or its weights fit no autoencoder.
    """
    build_args, state = load(path)
    try:
        model = autoencoder.build(**build_args)
        model.load_state_dict(state)
    except (ConfigError, RuntimeError, TypeError) as error:
        raise CheckpointError(
            "Weights do not fit the model that their file describes",
            where=path,
            found=str(error),
            do="export them again",
        ) from error
    return model.eval()
