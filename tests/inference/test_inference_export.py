"""What is exported computes what the checkpoint did, and says how to use it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from made_networks import BUILD, CLASSES, emotions, finetuned, pretrained, recipe, save_run, traits

import svfap_dist
from svfap_dist import storage
from svfap_dist.errors import CheckpointError
from svfap_dist.inference import onnx
from svfap_dist.inference.export import export
from svfap_dist.model import autoencoder, weights


@pytest.mark.parametrize(
    ("model", "config"),
    [(pretrained(), recipe()), (finetuned(3), emotions()), (finetuned(2), traits("tanh"))],
    ids=["pretrained", "classes", "values"],
)
def test_an_export_loads_as_what_it_was(tmp_path, model, config):
    run = save_run(tmp_path / "run", model, config)
    export(run, str(tmp_path / "out"), "safetensors", overrides={"region": "full"})
    before, after = svfap_dist.load(run, region="full"), svfap_dist.load(str(tmp_path / "out"))
    assert after.info == before.info
    clips = torch.randn(2, 3, 4, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(after(clips), before(clips), rtol=0, atol=1e-5)
        torch.testing.assert_close(after.features(clips), before.features(clips), rtol=0, atol=1e-5)


def test_a_pretrained_export_keeps_the_decoder_for_whoever_trains_on(tmp_path):
    model = pretrained()
    run = save_run(tmp_path / "run", model, recipe())
    done = export(run, str(tmp_path / "out"), "safetensors", overrides={})
    again = weights.load_autoencoder(done.weights_url)
    assert isinstance(again, autoencoder.MaskedAutoencoder)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_the_description_is_enough_for_other_programs(tmp_path):
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    done = export(run, str(tmp_path), "safetensors", license="CC-BY-4.0", overrides={})
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["weights"] == "model.safetensors"
    assert said["build"] == {**BUILD, "num_outputs": 3}
    clip = said["preprocessing"]
    assert [clip[name] for name in ("num_frames", "sampling_rate", "frame_size", "region")] == [
        *(4, 2, 64),
        "center",
    ]
    assert clip["mean"] == [0.485, 0.456, 0.406]
    assert clip["std"] == [0.229, 0.224, 0.225]
    assert said["task"] == {"kind": "classification", "names": list(CLASSES), "activation": "none"}
    assert said["testing"] == {"segments": 2, "crops": 2}
    assert said["licence"] == "CC-BY-4.0"
    assert said["provenance"]["run_url"] == run
    assert said["provenance"]["step"] == 7
    assert said["provenance"]["data_fingerprint"] == "data-fingerprint"
    assert done.parameters == sum(p.numel() for p in finetuned(3).parameters())


def test_onnx_computes_the_same_for_any_batch(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    run = save_run(tmp_path / "run", finetuned(2), traits("sigmoid"))
    done = export(run, str(tmp_path / "out"), "onnx", overrides={})
    assert done.onnx_difference is not None
    assert 0 < done.onnx_difference <= 1e-4
    assert done.opset == 20
    assert done.tensorrt == (
        f"trtexec --onnx={done.weights_url} --minShapes=clips:1x3x4x64x64 "
        "--optShapes=clips:8x3x4x64x64 --maxShapes=clips:32x3x4x64x64 --saveEngine=model.plan"
    )
    session = onnxruntime.InferenceSession(done.weights_url)
    network = svfap_dist.load(run)
    for count in (1, 5):
        clips = torch.randn(count, 3, 4, 64, 64)
        features, scores = session.run(["features", "scores"], {"clips": clips.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(features, network.features(clips), atol=1e-4)
            np.testing.assert_allclose(scores, network(clips), atol=1e-4)
    assert json.loads((tmp_path / "out/config.json").read_text())["weights"] == "model.onnx"
    with torch.no_grad():
        network.head.bias += 0.01
    with pytest.raises(CheckpointError, match="does not match the network"):
        onnx.check(storage.read_bytes(done.weights_url), network)


def test_torch_export_computes_the_same_for_any_batch(tmp_path):
    run = save_run(tmp_path / "run", finetuned(2), traits("sigmoid"))
    done = export(run, str(tmp_path / "out"), "torch-export", overrides={})
    assert done.torch_export_difference is not None
    assert done.torch_export_difference <= 1e-5
    program, network = torch.export.load(done.weights_url).module(), svfap_dist.load(run)
    for count in (1, 5):
        clips = torch.randn(count, 3, 4, 64, 64)
        features, scores = program(clips)
        with torch.no_grad():
            torch.testing.assert_close(features, network.features(clips), rtol=0, atol=1e-5)
            torch.testing.assert_close(scores, network(clips), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "out/config.json").read_text())["weights"] == "model.pt2"
    with pytest.raises(CheckpointError, match=r"model.pt2.*torch.export.load"):
        svfap_dist.load(str(tmp_path / "out"))
