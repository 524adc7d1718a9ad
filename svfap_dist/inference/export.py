"""Weights out of a run, for others: `svfap export`.

In: whatever `load` takes. Out: a folder with config.json (see `card`) and the weights, either as
model.safetensors, which `load` takes again and fine-tuning begins from, or as model.onnx, which
needs nothing of this program to run. config.json is written last, since nobody looks at a folder
without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.inference import model_info as cards
from svfap_dist.inference.load import ONNX, of_model, open_model
from svfap_dist.model import weights

FORMATS = ("safetensors", "onnx")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written. onnx_difference: the largest between torch's outputs and onnxruntime's."""

    weights_url: str
    config_url: str
    kind: str
    parameters: int
    onnx_difference: float | None = None

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.weights_url}: {self.kind}, {self.parameters:,} parameters",
            f"{self.config_url}: how to use them",
        ]
        if self.onnx_difference is not None:
            lines.append(f"onnxruntime differs by {self.onnx_difference:.1e} at most")
        return lines


def export(
    url: str, folder: str, format: str, *, licence: str = "", overrides: Mapping[str, Any]
) -> Exported:
    """Write the network of `url` to a folder (path or URL); overrides as in `network.load`.

    Raises: ConfigError for another format, or overrides that do not fit; CheckpointError if there
    is no network, or its ONNX form computes something else; StorageError.
    """
    if format not in FORMATS:
        raise ConfigError(
            "No such format", where="--format", found=format, do=f"use {' or '.join(FORMATS)}"
        )
    card, model = open_model(url, overrides)
    card = dataclasses.replace(card, licence=licence or card.licence)
    config_url = storage.join(folder, weights.BUILD)
    storage.delete(config_url)
    difference = None
    if format == "safetensors":
        weights_url = storage.join(folder, weights.WEIGHTS)
        weights.save(weights_url, model.state_dict(), card.build)
        parameters = sum(parameter.numel() for parameter in model.parameters())
    else:
        from svfap_dist.inference import onnx

        network = of_model(card, model)
        weights_url = storage.join(folder, ONNX)
        data, difference = onnx.to_onnx(network)
        storage.write_bytes(weights_url, data)
        parameters = sum(parameter.numel() for parameter in network.parameters())
    storage.write_bytes(config_url, cards.to_json(card, weights=weights_url.rpartition("/")[2]))
    return Exported(weights_url, config_url, card.kind, parameters, difference)
