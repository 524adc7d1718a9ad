"""Loading a network from any place: its outputs are those of the model that was saved."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from made_networks import BUILD, CLASSES, emotions, finetuned, pretrained, recipe, save_run, traits

import svfap_dist
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.model import weights


@pytest.fixture
def clips() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 4, 64, 64)


def test_of_a_pretrained_run_the_features_of_its_encoder(tmp_path, clips):
    model = pretrained()
    network = svfap_dist.load(save_run(tmp_path / "run", model, recipe()))
    assert not network.training
    assert network.info.kind == "features"
    assert (network.info.sampling_rate, network.info.window) == (2, 7)
    assert network.info.provenance["step"] == 7
    assert network.info.provenance["data_fingerprint"] == "data-fingerprint"
    with torch.no_grad():
        tokens = model.encoder(clips)[-1]
        expected = F.layer_norm(tokens.mean(dim=1), (32,), eps=1e-6)
        torch.testing.assert_close(network(clips), expected)
        torch.testing.assert_close(network.features(clips), expected)


def test_of_a_fine_tuned_checkpoint_scores_and_what_the_head_sees(tmp_path, clips):
    model = finetuned(3)
    run = save_run(tmp_path / "run", model, emotions())
    network = svfap_dist.load(f"{run}/checkpoints/step-000000007")
    assert network.info.kind == "classification"
    assert network.info.names == CLASSES
    assert network.info.provenance["set"] == "dfew"
    with torch.no_grad():
        torch.testing.assert_close(network(clips), model(clips))
        torch.testing.assert_close(model.head(network.features(clips)), model(clips))


@pytest.mark.parametrize(("output", "squash"), [("sigmoid", torch.sigmoid), ("tanh", torch.tanh)])
def test_values_of_a_regression_are_squashed_as_in_training(tmp_path, clips, output, squash):
    model = finetuned(2)
    network = svfap_dist.load(save_run(tmp_path / "run", model, traits(output)))
    assert network.info.kind == "regression"
    with torch.no_grad():
        torch.testing.assert_close(network(clips), squash(model(clips)))


def test_a_network_without_a_head_is_named_by_where_it_was_loaded_from(tmp_path):
    from typer.testing import CliRunner

    from svfap_dist.cli.app import app

    run = save_run(tmp_path / "run", pretrained(), recipe())
    exported = str(tmp_path / "exported")
    assert CliRunner().invoke(app, ["export", run, "-o", exported]).exit_code == 0
    error = CliRunner().invoke(app, ["predict", exported, "a.mp4"]).exception
    assert isinstance(error, CheckpointError)
    assert error.where == exported


def test_how_clips_are_cut_and_averaged_is_the_recipes(tmp_path):
    config = emotions()
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"region": "full", "sampling_rate": 3}),
            "finetune": config.finetune.model_copy(update={"test_segments": 5, "test_crops": 1}),
        }
    )
    card = svfap_dist.load(save_run(tmp_path / "run", finetuned(3), config)).info
    assert (card.region, card.sampling_rate, card.window) == ("full", 3, 10)
    assert (card.test_segments, card.test_crops) == (5, 1)


def test_frames_may_come_as_bytes(tmp_path):
    network = svfap_dist.load(save_run(tmp_path / "run", pretrained(), recipe()))
    frames = torch.randint(0, 256, (2, 4, 64, 64, 3), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    clips = ((frames / 255 - mean) / std).permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        torch.testing.assert_close(network(frames), network(clips))


def test_of_an_imported_folder_what_the_user_says_counts(tmp_path, clips):
    model = finetuned(3)
    build = {**BUILD, "num_outputs": 3}
    weights.save(str(tmp_path / "model.safetensors"), model.state_dict(), build)
    (tmp_path / "config.json").write_text(json.dumps(build))
    network = svfap_dist.load(str(tmp_path))
    card = network.info
    assert (card.num_frames, card.sampling_rate, card.frame_size) == (4, 4, 64)
    assert (card.kind, card.region, card.names) == ("classification", "center", ())
    told = svfap_dist.load(
        str(tmp_path), region="full", sampling_rate=1, kind="regression", names=["a", "b", "c"]
    )
    assert (told.info.region, told.info.window, told.info.names) == ("full", 4, ("a", "b", "c"))
    with torch.no_grad():
        torch.testing.assert_close(told(clips), model(clips))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"names": ["a"]}, "names.*3 outputs"),
        ({"region": "nose"}, "region = 'nose'.*voxceleb2, center, full"),
        ({"sampling_rate": 0}, "sampling_rate = 0"),
        ({"kind": "features"}, "kind = 'features'.*3 outputs"),
        ({"license": "mine"}, "license.*use one of activation"),
    ],
)
def test_overrides_that_do_not_fit_are_refused(tmp_path, overrides, words):
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    with pytest.raises(ConfigError, match=words):
        svfap_dist.load(run, **overrides)


def test_nothing_to_load_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="No committed checkpoint"):
        svfap_dist.load(str(tmp_path))
    save_run(tmp_path / "folds" / "fold-2", finetuned(3), emotions())
    with pytest.raises(CheckpointError, match=r"give one of them: .*/folds/fold-2"):
        svfap_dist.load(str(tmp_path / "folds"))
    (tmp_path / "config.json").write_text('{"format": "of another kind"}')
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="of another kind"):
        svfap_dist.load(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="onnxruntime"):
        svfap_dist.load(str(tmp_path))


def test_loading_needs_no_deepspeed_and_importing_needs_nothing(tmp_path):
    run = save_run(tmp_path / "run", pretrained(), recipe())
    code = (
        "import sys, svfap_dist\n"
        "heavy = {'torch', 'numpy', 'av', 'ray', 'deepspeed'}\n"
        "assert not heavy & set(sys.modules)\n"
        "svfap_dist.load(sys.argv[1])\n"
        "import svfap_dist.inference.extract\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, run], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['av', 'numpy', 'torch']"
