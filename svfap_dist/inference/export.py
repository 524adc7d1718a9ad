"""Write a network for others to use: `svfap export`.

In: whatever `load` takes. Out: a folder with config.json (a `ModelInfo`) and the weights:

    safetensors     model.safetensors, which `load` and finetune.init read
    huggingface     the same and a model card; `HubNetwork.from_pretrained` reads it, too
    onnx            model.onnx, which needs nothing of this program to run
    torch-export    model.pt2, for `torch.export.load`

config.json is the commit marker: it is written last.
"""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from svfap_dist import storage
from svfap_dist.checkpoint import load as checkpoints
from svfap_dist.errors import ConfigError, SvfapError
from svfap_dist.inference import card
from svfap_dist.inference.load import ONNX, TORCH_EXPORT, network_of, open_model
from svfap_dist.model import weights
from svfap_dist.model.weights import ModelInfo
from svfap_dist.storage.hub import local_folder

log = logging.getLogger(__name__)

HUGGINGFACE = "huggingface"
FORMATS = ("safetensors", HUGGINGFACE, "onnx", "torch-export")
_UNKNOWN_LICENSE = "License of the initial weights unknown"


@dataclasses.dataclass(frozen=True)
class ExportResult:
    """What was written.

    Attributes:
        weights_url: file of the weights.
        config_url: the description.
        kind: of the network.
        parameters: how many it has.
        onnx_difference: the largest between torch's outputs and onnxruntime's.
        torch_export_difference: the largest between torch's outputs and the program's.
        opset: of an ONNX model.
        tensorrt: the command that builds a TensorRT engine from it.
        license: of the weights; empty: unknown.
        commit_url: of the upload to the Hub.
    """

    weights_url: str
    config_url: str
    kind: str
    parameters: int
    onnx_difference: float | None = None
    torch_export_difference: float | None = None
    opset: int | None = None
    tensorrt: str = ""
    license: str = ""
    commit_url: str = ""

    def lines(self) -> list[str]:
        """Return a summary to print."""
        lines = [
            f"{self.weights_url}: {self.kind}, {self.parameters:,} parameters",
            f"{self.config_url}: how to use them",
        ]
        if self.license:
            lines.append(f"License of the weights: {self.license}")
        if self.onnx_difference is not None:
            lines.append(f"Opset {self.opset}, any batch size")
            lines.append(f"onnxruntime differs by {self.onnx_difference:.1e} at most")
            lines.append(f"TensorRT: {self.tensorrt}")
        if self.torch_export_difference is not None:
            lines.append(f"torch.export differs by {self.torch_export_difference:.1e} at most")
        if self.commit_url:
            lines.append(f"Uploaded: {self.commit_url}")
        return lines


def export(
    url: str,
    folder: str,
    format: str,
    *,
    license: str = "",
    overrides: Mapping[str, Any],
    repository: str = "",
) -> ExportResult:
    """Write a network to a folder.

    Args:
        url: a run, checkpoint, imported or exported folder, or hf://owner/name.
        folder: path or URL to write to.
        format: one of `FORMATS`.
        license: of the weights; empty: as stored, or that of the weights it was fine-tuned from.
        overrides: as `load.load`.
        repository: on the Hub, owner/name, that the export is for; empty: none.

    Raises:
        ConfigError: The format is unknown, an override does not fit, or the license of an export
            for the Hub cannot be found out.
        CheckpointError: There is no network, or its graph computes something else.
        StorageError: The store fails.
    """
    if format not in FORMATS:
        advice = f"use {', '.join(FORMATS[:-1])} or {FORMATS[-1]}"
        raise ConfigError("Unknown format", where="--format", found=format, do=advice)
    url = local_folder(url)
    info, model = open_model(url, overrides)
    info = dataclasses.replace(info, license=_license(info, license, is_for_hub=bool(repository)))
    network = network_of(info, model)
    # The record of a run is read before its folder may be written to.
    record = card.RunRecord()
    if format == HUGGINGFACE:
        record = card.read_run(url, info.provenance.get("step"))
    name = {"onnx": ONNX, "torch-export": TORCH_EXPORT}.get(format, weights.WEIGHTS)
    config_url, weights_url = (storage.join(folder, part) for part in (weights.BUILD, name))
    exported = model if name == weights.WEIGHTS else network
    parameters = sum(parameter.numel() for parameter in exported.parameters())
    result = ExportResult(weights_url, config_url, info.kind, parameters, license=info.license)
    storage.delete(config_url)
    if format == "onnx":
        from svfap_dist.inference import onnx

        data, difference = onnx.to_onnx(network)
        storage.write_bytes(weights_url, data)
        command = onnx.tensorrt_command(info, weights_url)
        result = dataclasses.replace(
            result, onnx_difference=difference, opset=onnx.OPSET, tensorrt=command
        )
    elif format == "torch-export":
        from svfap_dist.inference import torch_export

        data, difference = torch_export.to_torch_export(network)
        storage.write_bytes(weights_url, data)
        result = dataclasses.replace(result, torch_export_difference=difference)
    else:
        if format == HUGGINGFACE:
            text = card.make_card(info, record, repository or "OWNER/NAME")
            storage.write_bytes(storage.join(folder, card.CARD), text.encode())
            info = card.without_locations(info)
        weights.save(weights_url, model.state_dict(), info.build, info)
    storage.write_bytes(config_url, info.to_json(name))
    return result


def export_to_hub(
    url: str, folder: str, repository: str, *, license: str = "", overrides: Mapping[str, Any]
) -> ExportResult:
    """Export a network in the Hub's format and upload it.

    Args:
        url: as `export`.
        folder: path or URL to write to; empty: a temporary one.
        repository: on the Hub, owner/name; created, as private, if it does not exist.
        license: as `export`.
        overrides: as `export`.

    Raises:
        ConfigError: As `export`, or the repository's name has another form.
        CheckpointError: As `export`.
        StorageError: The store or the Hub refuses or does not answer.
    """
    from svfap_dist.inference import hub

    with tempfile.TemporaryDirectory(prefix="svfap-export-") as temporary:
        written = folder or temporary
        result = export(
            url,
            written,
            HUGGINGFACE,
            license=license,
            overrides=overrides,
            repository=repository,
        )
        return dataclasses.replace(result, commit_url=hub.push(written, repository))


def _license(info: ModelInfo, given: str, is_for_hub: bool) -> str:
    """Return the license: as given, as stored, or that of the weights it was fine-tuned from.

    Runs store it; those of earlier versions do not.
    """
    stored = info.license
    if not stored:
        init = info.provenance.get("init", "")
        try:
            stored = checkpoints.load_license(init)
        except SvfapError as error:
            if is_for_hub and not given:
                where, found = f"finetune.init = {init}", f"{error.what}: {error.found}"
                advice = "find out which license they have and give it with --license"
                raise ConfigError(_UNKNOWN_LICENSE, where, found, advice) from error
            log.warning("%s: %s", _UNKNOWN_LICENSE, error)
    if given and stored and given.lower() != stored.lower():
        log.warning(
            "License %s replaces the stored license %s: check that you may relicense the weights.",
            given,
            stored,
        )
    return given or stored
