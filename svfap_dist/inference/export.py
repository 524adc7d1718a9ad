"""Write a network for others to use: `svfap export`.

In: whatever `load` takes. Out: a folder with config.json (a `ModelInfo`) and the weights, either
as model.safetensors, which `load` and finetune.init read, or as model.onnx, which needs nothing of
this program to run. config.json is the commit marker: it is written last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from svfap_dist import storage
from svfap_dist.errors import ConfigError
from svfap_dist.inference.load import ONNX, network_of, open_model
from svfap_dist.model import weights

FORMATS = ("safetensors", "onnx")


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written. onnx_difference: the largest between torch's outputs and onnxruntime's."""

    weights_url: str
    config_url: str
    kind: str
    parameters: int
    onnx_difference: float | None = None

    def lines(self) -> list[str]:
        """Return a summary to print."""
        lines = [
            f"{self.weights_url}: {self.kind}, {self.parameters:,} parameters",
            f"{self.config_url}: how to use them",
        ]
        if self.onnx_difference is not None:
            lines.append(f"onnxruntime differs by {self.onnx_difference:.1e} at most")
        return lines


def export(
    url: str, folder: str, format: str, *, license: str = "", overrides: Mapping[str, Any]
) -> ExportResult:
    """Write a network to a folder.

    Args:
        url: a run, checkpoint, imported or exported folder.
        folder: path or URL to write to.
        format: safetensors or onnx.
        license: of the weights; empty: as stored.
        overrides: as `load.load`.

    Raises:
        ConfigError: The format is unknown, or an override does not fit.
        CheckpointError: There is no network, or its ONNX form computes something else.
        StorageError: The store fails.
    """
    if format not in FORMATS:
        raise ConfigError(
            "Unknown format", where="--format", found=format, do=f"use {' or '.join(FORMATS)}"
        )
    info, model = open_model(url, overrides)
    info = dataclasses.replace(info, license=license or info.license)
    name = weights.WEIGHTS if format == "safetensors" else ONNX
    config_url, weights_url = (storage.join(folder, part) for part in (weights.BUILD, name))
    storage.delete(config_url)
    difference = None
    if format == "safetensors":
        weights.save(weights_url, model.state_dict(), info.build, info)
        exported = model
    else:
        from svfap_dist.inference import onnx

        exported = network_of(info, model)
        data, difference = onnx.to_onnx(exported)
        storage.write_bytes(weights_url, data)
    parameters = sum(parameter.numel() for parameter in exported.parameters())
    storage.write_bytes(config_url, info.to_json(name))
    return ExportResult(weights_url, config_url, info.kind, parameters, difference)
