"""Networks of f84d50d (runs, imports, exports) give the same features and predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alike import differences
from compat_cases import FEATURES, NETWORKS

import svfap_dist


@pytest.mark.parametrize("name", NETWORKS)
def test_load_and_extract_give_the_same_features(
    name: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    assert differences(now["python"][name], then["python"][name]) == []


def test_a_network_says_what_its_outputs_are(old_files: Path) -> None:
    network = svfap_dist.load(str(old_files / "exports/classifier"))
    assert network.card.names[:2] == ("happy", "sad")
    assert network.card.window == 8
    assert network.card.provenance["run_url"] == "runs/finetune/fold-1"


@pytest.mark.parametrize("path", FEATURES)
def test_svfap_extract_writes_the_same_arrays(
    path: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    for name in ("extract", "extract shards", "extract imported"):
        assert now["commands"][name]["code"] == 0, now["stderr"][name]
    assert differences(now["features"][path], then["features"][path]) == []


@pytest.mark.parametrize("name", ["predict", "predict export", "predict import", "predict onnx"])
def test_svfap_predict_gives_the_same_scores(
    name: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    assert differences(now["commands"][name], then["commands"][name]) == [], now["stderr"][name]


@pytest.mark.parametrize("name", ["exported", "exported again", "exported import"])
def test_an_old_network_exported_now_predicts_the_same(
    name: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    predicted = f"predict {name}"
    assert now["commands"][predicted]["code"] == 0, now["stderr"][predicted]
    assert differences(now["commands"][predicted], then["commands"][predicted]) == []


def test_the_licence_of_an_export_is_kept(now: dict[str, Any], old_files: Path) -> None:
    for folder in (old_files / "exports/classifier", now["folder"] / "out/exported-again"):
        assert "MIT" in (folder / "config.json").read_text()


def test_an_old_onnx_file_computes_what_its_network_does(old_files: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    import torch

    clips = torch.randn(2, 3, 8, 16, 16, generator=torch.Generator().manual_seed(0))
    path = str(old_files / "exports/onnx/model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    features, scores = session.run(["features", "scores"], {"clips": clips.numpy()})
    network = svfap_dist.load(str(old_files / "exports/classifier"))
    with torch.inference_mode():
        np.testing.assert_allclose(scores, network(clips), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(features, network.features(clips), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("folder", ["exports/classifier", "imported"])
def test_old_weights_fit_what_build_makes(folder: str, old_files: Path) -> None:
    from safetensors.torch import load_file

    from svfap_dist.model import classifier

    described = json.loads((old_files / folder / "config.json").read_text())
    model = classifier.build(**described.get("build", described))
    model.load_state_dict(load_file(old_files / folder / "model.safetensors"))


def test_old_weights_of_pre_training_fit_what_build_makes(old_files: Path) -> None:
    from safetensors.torch import load_file

    from svfap_dist.model import autoencoder

    described = json.loads((old_files / "exports/encoder/config.json").read_text())
    model = autoencoder.build(**described["build"])
    for folder in ("exports/encoder", "runs/two-ranks/checkpoints/step-000000003"):
        model.load_state_dict(load_file(old_files / folder / "model.safetensors"))
