"""Load a trained network for inference: `svfap_dist.load(url)`.

In: the URL of a run, of one checkpoint, of a folder made by `svfap import` or `svfap export`, or of
a repository on the Hugging Face Hub. Out: a `Network` in eval mode, on the CPU, in float32. Of a
pre-trained autoencoder that is its encoder: only pre-training needs the pixel decoder. DeepSpeed is
not imported.

Features are the input of the head: the encoder's tokens pooled as the network was fine-tuned (by
default the mean over those of the last stage), then a LayerNorm. A pre-trained network has not
learned that LayerNorm, so it has neither scale nor shift there, as fine-tuning begins. Adapters of
LoRA are merged into the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load as checkpoints
from svfap_dist.checkpoint import store
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import weights
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.classifier import ACTIVATIONS, Classifier
from svfap_dist.model.layers import layer_norm
from svfap_dist.model.pooling import Pool, build_pool
from svfap_dist.model.weights import ModelInfo
from svfap_dist.storage.hub import local_folder

Model = MaskedAutoencoder | Classifier

ONNX, TORCH_EXPORT = "model.onnx", "model.pt2"
_LOADERS = {ONNX: "onnxruntime", TORCH_EXPORT: "torch.export.load"}


class Network(nn.Module):
    """Encoder, and head if there is one, with the description of how to use them.

    Clips are uint8 RGB frames [B, F, H, W, 3], or floats [B, 3, F, H, W] normalized with ImageNet
    statistics; F, H and W as `info` says.

    Args:
        info: Description of the network and its clips.
        encoder: Returns the tokens of each stage.
        fc_norm: LayerNorm applied to each pooled vector.
        head: Linear head; None for a pre-trained network.
        pool: Maps the tokens of all stages to vectors [B, V, D].
    """

    def __init__(
        self,
        info: ModelInfo,
        encoder: nn.Module,
        fc_norm: nn.LayerNorm,
        head: nn.Module | None,
        pool: Pool,
    ) -> None:
        super().__init__()
        self.info = info
        self.encoder, self.pool, self.fc_norm, self.head = encoder, pool, fc_norm, head
        self.activation = ACTIVATIONS[info.activation]()

    @property
    def card(self) -> ModelInfo:
        """The earlier name of `info`."""
        return self.info

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def num_features(self) -> int:
        """Features of a clip, V*D."""
        return self.pool.num_vectors * self.fc_norm.normalized_shape[0]

    def features(self, clips: Tensor) -> Tensor:
        """Return features [B, V*D]; V is 1 unless a classifier pools otherwise.

        Args:
            clips: see the class.
        """
        return self.fc_norm(self.pool(self.encoder(clips))).flatten(1)

    def outputs(self, clips: Tensor) -> Tensor:
        """Return outputs [B, num_outputs] before the activation; features [B, D] without a head.

        Args:
            clips: see the class.
        """
        features = self.features(clips)
        return features if self.head is None else self.head(features)

    def forward(self, clips: Tensor) -> Tensor:
        """Return a logit per class or a value per dimension; features [B, D] without a head.

        Args:
            clips: see the class.
        """
        return self.activation(self.outputs(clips))

    def check_head(self, url: str = "") -> None:
        """Check that the network is fine-tuned.

        Args:
            url: where it was loaded from, for the error (default: the run that trained it).

        Raises:
            CheckpointError: It has no head.
        """
        if self.head is None:
            raise CheckpointError(
                "Network has no head",
                where=url or self.info.provenance.get("run_url", ""),
                found="a pre-trained network, which gives features and no labels",
                do="fine-tune it with `svfap finetune`, or take features with `svfap extract`",
            )


def load(url: str, **overrides: Any) -> Network:
    """Return the network of a run, checkpoint, imported or exported folder, ready to use.

    Args:
        url: a path or URL; hf://owner/name[@revision] is a repository on the Hugging Face Hub.
        **overrides: fields of `ModelInfo` that replace what is stored: sampling_rate, region, kind,
            names, activation, test_segments, test_crops.

    Raises:
        CheckpointError: There is no network, or it is damaged.
        ConfigError: An override does not fit.
        StorageError: The store fails.
    """
    return network_of(*open_model(url, overrides))


def move(network: Network, device: str) -> Network:
    """Return the network on a device.

    Args:
        network: from `load`.
        device: cpu, cuda, ...; empty: cuda if available.

    Raises:
        ConfigError: The device is not available.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return network.to(wanted)
    except (RuntimeError, AssertionError) as error:
        found = f"{wanted}: {error}"
        raise ConfigError("Device not available", "--device", found, "use cpu or cuda") from error


def open_model(url: str, overrides: Mapping[str, Any]) -> tuple[ModelInfo, Model]:
    """Return the description and the whole model, decoder included, in eval mode.

    Args:
        url: as `load`.
        overrides: as `load`.

    Raises:
        CheckpointError: As `load`.
        ConfigError: As `load`.
        StorageError: As `load`.
    """
    url = local_folder(url)
    config_url = storage.join(url, weights.BUILD)
    config = None
    if storage.exists(config_url):
        weights_url = _exported_weights(url)
        # What a user may have edited comes first.
        info = ModelInfo.from_json(storage.read_bytes(config_url), config_url)
    else:
        weights_url, config = checkpoints.locate_weights(url)
        info = weights.load_info(weights_url)
    build, model = weights.load_any(weights_url)
    if info is None and config is not None:  # a checkpoint of an earlier version
        where = storage.join(weights_url.rpartition("/")[0], store.STATE)
        state = store.TrainState.from_json(storage.read_bytes(where), where)
        info = ModelInfo.of_run(build, config, state.provenance)
    info = info or ModelInfo.of_build(build, model.size)  # an import of an earlier version
    if "lora" in info.build:  # merged now
        info = dataclasses.replace(info, build=build)
    return info.with_overrides(overrides), model


def network_of(info: ModelInfo, model: Model) -> Network:
    """Return the part of a model that inference needs.

    Args:
        info: the description.
        model: as `open_model` returns it.
    """
    if isinstance(model, Classifier):
        return Network(info, model.encoder, model.fc_norm, model.head, model.pool).eval()
    pool, norm = build_pool(model.size), layer_norm(model.size.embed_dim)
    return Network(info, model.encoder, norm, None, pool).eval()


def _exported_weights(url: str) -> str:
    weights_url = storage.join(url, weights.WEIGHTS)
    if not storage.exists(weights_url):
        for name, loader in _LOADERS.items():
            if storage.exists(storage.join(url, name)):
                raise CheckpointError(
                    "Network was exported as a graph",
                    where=url,
                    found=f"{name} and no {weights.WEIGHTS}",
                    do=f"open it with {loader}, or export it again with --format safetensors",
                )
    return weights_url
