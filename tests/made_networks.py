"""Networks as training leaves them: small, untrained, in checkpoints made by hand."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import torch

from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import (
    Config,
    DataConfig,
    FinetuneConfig,
    MaskConfig,
    ModelConfig,
    TaskConfig,
)
from svfap_dist.model import autoencoder, classifier, weights

BUILD = {"size": "nano", "stage_depths": [1, 2], "num_frames": 4, "frame_size": 64}
CLASSES = ("happy", "sad", "neutral")
WINDOW = 7  # frames that a clip spans: 4 of them, 2 apart


def recipe(**sections) -> Config:
    """Clips of 4 frames, every second one, of 64 pixels."""
    return Config(
        data=DataConfig(num_frames=4, frame_size=64, sampling_rate=2, region="center"),
        mask=MaskConfig(ratio=0.5),
        model=ModelConfig(size="nano", stage_depths=(1, 2)),
        **sections,
    )


def emotions() -> Config:
    """A recipe of fine-tuning on three classes."""
    task = TaskConfig(
        kind="classification", set="dfew", label="class", names=CLASSES, metrics=("uar",)
    )
    return recipe(task=task)


def traits(output: str) -> Config:
    """A recipe of fine-tuning on two dimensions."""
    names = ("openness", "extraversion")
    task = TaskConfig(
        kind="regression", set="firstimpressions", label="values", names=names, metrics=("ccc",)
    )
    return recipe(task=task, finetune=FinetuneConfig(output=output))


def pretrained() -> autoencoder.MaskedAutoencoder:
    """An autoencoder with weights of its own."""
    torch.manual_seed(1)
    return autoencoder.build(**BUILD).eval()


def finetuned(num_outputs: int) -> classifier.Classifier:
    """A classifier whose scores differ from clip to clip: a head as it begins gives almost none."""
    torch.manual_seed(2)
    model = classifier.build(**BUILD, num_outputs=num_outputs).eval()
    with torch.no_grad():
        model.head.weight.mul_(1000)
        model.fc_norm.weight.copy_(torch.rand(32) + 0.5)
        model.fc_norm.bias.copy_(torch.randn(32))
    return model


def save_run(folder: Path, model: torch.nn.Module, config: Config, step: int = 7) -> str:
    """A run with one committed checkpoint; its URL."""
    build = dict(BUILD)
    if isinstance(model, classifier.Classifier):
        build["num_outputs"] = model.head.out_features
    config = config.model_copy(update={"run": config.run.model_copy(update={"url": str(folder)})})
    url = folder / "checkpoints" / f"step-{step:09d}"
    weights.save(str(url / "model.safetensors"), model.state_dict(), build)
    made = TrainState.of_run(config, step, 10, "data-fingerprint", 1)
    (url / "state.json").write_bytes(made.to_json())
    files = json.dumps(
        {
            "files": [
                {"name": name, "size": os.path.getsize(url / name), "sha256": _sha256(url / name)}
                for name in ("model.safetensors", "state.json")
            ]
        }
    )
    (url / "files.json").write_text(files)
    (url / "COMMIT").write_text(hashlib.sha256(files.encode()).hexdigest())
    return str(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
