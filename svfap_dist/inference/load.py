"""A trained network to look at clips with, from wherever it lies: `svfap_dist.load(url)`.

In: the URL of a run, of one checkpoint, of a folder made by `svfap import` or of one made by `svfap
export`. Out: a `Network` in eval mode, on the CPU, in float32. Of a pre-trained autoencoder that is
its encoder: the pixel decoder is of no use to anybody but pre-training. No DeepSpeed is imported.

Features are what the head sees: the mean over the tokens of the encoder's last stage, then a
LayerNorm. A pre-trained network has not learnt that LayerNorm, so it has neither scale nor shift
there: just what fine-tuning begins with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svfap_dist import storage
from svfap_dist.checkpoint import load as trained
from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.errors import CheckpointError
from svfap_dist.inference import model_info as cards
from svfap_dist.inference.model_info import Card
from svfap_dist.model import weights
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.classifier import ACTIVATIONS, Classifier
from svfap_dist.model.layers import layer_norm

Model = MaskedAutoencoder | Classifier

ONNX = "model.onnx"


class Network(nn.Module):
    """Encoder, and head if there is one, with the card that says how to use them.

    Clips are uint8 RGB frames [B, F, H, W, 3], or floats [B, 3, F, H, W] normalised with ImageNet
    statistics; F, H and W as the card says.
    """

    def __init__(
        self, card: Card, encoder: nn.Module, fc_norm: nn.Module, head: nn.Module | None
    ) -> None:
        super().__init__()
        self.card = card
        self.encoder, self.fc_norm, self.head = encoder, fc_norm, head
        self.activation = ACTIVATIONS[card.activation]()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def features(self, clips: Tensor) -> Tensor:
        """What the network makes of clips, [B, D]."""
        return self.fc_norm(self.encoder(clips)[-1].mean(dim=1))

    def forward(self, clips: Tensor) -> Tensor:
        """Of a fine-tuned network scores [B, num_outputs]: a logit per class, or a value per
        dimension. Of a pre-trained one features [B, D]."""
        features = self.features(clips)
        return features if self.head is None else self.activation(self.head(features))

    def check_head(self) -> None:
        """Raises: CheckpointError if the network has no head."""
        if self.head is None:
            raise CheckpointError(
                "Network has no head",
                where=self.card.provenance.get("run_url", ""),
                found="a pre-trained network, which gives features and no labels",
                do="fine-tune it with `svfap finetune`, or take features with `svfap extract`",
            )


def load(url: str, **overrides: Any) -> Network:
    """The network of a run, checkpoint, imported or exported folder, ready to use.

    Args:
        url: a path or URL.
        overrides: fields of `card.Card` to take in the place of what is known: sampling_rate,
            region, kind, names, activation, test_segments, test_crops.

    Raises: CheckpointError if there is none, or it is damaged; ConfigError for overrides that do
    not fit; StorageError.
    """
    return of_model(*open_model(url, overrides))


def open_model(url: str, overrides: Mapping[str, Any]) -> tuple[Card, Model]:
    """The card and the whole model, decoder included, in eval mode; as `load` otherwise."""
    where = storage.join(url, weights.BUILD)
    if storage.exists(where):
        weights_url = _exported_weights(url)
        card = cards.from_json(storage.read_bytes(where), where)
        build, model = weights.load_any(weights_url)
        card = card or cards.of_import(build, model.size)
    else:
        weights_url, config = trained.locate_weights(url)
        where = storage.join(weights_url.rpartition("/")[0], store.STATE)
        state = TrainState.from_json(storage.read_bytes(where), where)
        build, model = weights.load_any(weights_url)
        card = cards.of_checkpoint(build, config, state)
    return card.with_overrides(overrides), model


def of_model(card: Card, model: Model) -> Network:
    """The part of a model that looks at clips."""
    if isinstance(model, Classifier):
        return Network(card, model.encoder, model.fc_norm, model.head).eval()
    return Network(card, model.encoder, layer_norm(model.size.embed_dim), None).eval()


def _exported_weights(url: str) -> str:
    weights_url = storage.join(url, weights.WEIGHTS)
    if not storage.exists(weights_url) and storage.exists(storage.join(url, ONNX)):
        raise CheckpointError(
            "Network was exported for other programs",
            where=url,
            found=f"{ONNX} and no {weights.WEIGHTS}",
            do="open it with onnxruntime, or export it again with --format safetensors",
        )
    return weights_url
