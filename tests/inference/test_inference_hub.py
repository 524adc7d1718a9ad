"""Networks go to the Hugging Face Hub and come back, with a card that says what they are."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import hub_server
import pytest
import torch
import yaml
from huggingface_hub import constants
from made_networks import BUILD, CLASSES, emotions, finetuned, pretrained, recipe, save_run
from typer.testing import CliRunner

import svfap_dist
from svfap_dist import storage
from svfap_dist.checkpoint import load as checkpoints
from svfap_dist.checkpoint.best import BestCheckpoint, write_best
from svfap_dist.cli.app import app
from svfap_dist.errors import ConfigError, StorageError
from svfap_dist.inference.export import export
from svfap_dist.inference.load import open_model
from svfap_dist.model import weights
from svfap_dist.model.weights import ModelInfo
from svfap_dist.storage import StorageMissingError, StorageUnreachableError
from svfap_dist.storage import hub as hub_urls

CLIPS = torch.randn(2, 3, 4, 64, 64)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server.running() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield server


def write_results(run, **more) -> None:
    metrics = {"uar": {"pooled": 63.25, "deviation": 1.5, "published": 62.83}}
    results = {"set": "dfew", "label": "class", "metrics": metrics, "is_complete": True}
    recall = dict(zip(CLASSES, (80.0, 40.5, 69.25), strict=True))
    (run / "results.json").write_text(json.dumps(results | {"recall": recall} | more))


def same(first: torch.nn.Module, second: torch.nn.Module) -> None:
    with torch.no_grad():
        torch.testing.assert_close(first(CLIPS), second(CLIPS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "make", [lambda: (pretrained(), recipe()), lambda: (finetuned(3), emotions())]
)
def test_an_export_loads_from_its_folder_by_the_mixin(tmp_path, make):
    run = save_run(tmp_path / "run", *make())
    export(run, str(tmp_path / "out"), "huggingface", overrides={})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "config.json", "model.safetensors")
    ]
    network = svfap_dist.HubNetwork.from_pretrained(tmp_path / "out")
    assert not network.training
    same(network, svfap_dist.load(run))
    same(svfap_dist.load(str(tmp_path / "out")), svfap_dist.load(run))
    again = svfap_dist.HubNetwork.from_pretrained(str(tmp_path / "out"), region="full")
    assert again.info.region == "full"
    with pytest.raises(ConfigError, match="svfap export"):
        network.save_pretrained(tmp_path / "other")


def test_it_is_uploaded_and_loaded_by_url(tmp_path, hub):
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    done = CliRunner().invoke(app, ["export", run, "--push", "lab/faces", "--json"])
    assert done.exception is None
    assert json.loads(done.stdout)["commit_url"] == f"{hub.url}/lab/faces/commit/{'c' * 40}"
    assert hub.made[0]["visibility"] == "private"
    files = hub.repositories["lab/faces"]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert b'HubNetwork.from_pretrained("lab/faces")' in files["README.md"]
    network = svfap_dist.load("hf://lab/faces", names=["x", "y", "z"])
    assert network.info.names == ("x", "y", "z")
    same(network, svfap_dist.load(run))
    same(svfap_dist.HubNetwork.from_pretrained("lab/faces"), network)
    build, state = checkpoints.load_weights("hf://lab/faces@main")  # as finetune.init
    assert build["num_outputs"] == 3
    assert len(state) == len(finetuned(3).state_dict())


def test_what_the_hub_refuses_is_an_error_of_four_parts(tmp_path, hub, monkeypatch):
    with pytest.raises(StorageError, match=r"no such repository.*HF_TOKEN"):
        svfap_dist.load("hf://lab/none")
    with pytest.raises(ConfigError, match="hf://owner/name"):
        svfap_dist.load("hf://lab")
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        raise CliRunner().invoke(app, ["export", run, "--push", "faces"]).exception
    words = ["export", run, "--push", "lab/faces", "--format", "onnx"]
    with pytest.raises(ConfigError, match="leave out --push"):
        raise CliRunner().invoke(app, words).exception
    with pytest.raises(ConfigError, match="-o"):
        raise CliRunner().invoke(app, ["export", run]).exception
    hub.repositories["lab/faces"] = {}
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(StorageError, match="HF_TOKEN"):
        raise CliRunner().invoke(app, ["export", run, "--push", "lab/faces"]).exception
    assert hub.repositories["lab/faces"] == {}


@pytest.mark.parametrize("revision", ["v1", "refs/pr/1", "feature/x"])
def test_a_revision_may_have_slashes(tmp_path, hub, revision):
    made = {"main": (finetuned(3), emotions()), revision: (pretrained(), recipe())}
    for name, parts in made.items():
        folder = tmp_path / "exported" / name
        export(save_run(tmp_path / name, *parts), str(folder), "huggingface", overrides={})
        files = {path.name: path.read_bytes() for path in folder.glob("*.*")}
        hub.branches["lab/faces", name] = files
    hub.repositories["lab/faces"] = hub.branches.pop(("lab/faces", "main"))
    same(svfap_dist.load("hf://lab/faces"), svfap_dist.load(str(tmp_path / "main")))
    for url in (f"hf://lab/faces@{revision}", f"hf://lab/faces@{revision}/"):
        same(svfap_dist.load(url), svfap_dist.load(str(tmp_path / revision)))
    with pytest.raises(StorageMissingError, match="no such repository or revision"):
        svfap_dist.load("hf://lab/faces@refs/pr/2")


def failure_of(url: str) -> StorageError:
    with pytest.raises(StorageError) as caught:
        svfap_dist.load(url)
    return caught.value


def test_a_hub_that_cannot_answer_now_may_be_asked_again(hub):
    hub.repositories["lab/faces"] = {}
    for status in (429, 503):
        hub.status = status
        error = failure_of("hf://lab/faces")
        assert isinstance(error, StorageUnreachableError)
        assert f"status {status}" in error.found
        assert "HF_TOKEN" not in error.do
    hub.status = 418  # that answer is final
    error = failure_of("hf://lab/faces")
    assert not error.retryable
    assert "status 418" in error.found


def test_a_hub_without_an_answer_is_unreachable(hub, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    error = failure_of("hf://lab/faces")
    assert isinstance(error, StorageUnreachableError)
    assert "network" in error.do


def test_a_refusal_to_read_does_not_speak_of_writing(hub, monkeypatch):
    hub.repositories["lab/faces"] = {}
    hub.gated.add("lab/faces")
    assert "accept its conditions" in failure_of("hf://lab/faces").do
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert failure_of("hf://lab/faces").do == "set HF_TOKEN to a valid token with the right to read"
    refused = hub_urls.explain_hub(failure_of("hf://lab/faces").__cause__, "hf://a/b", writes=True)
    assert refused.do == "set HF_TOKEN to a valid token with the right to write"


def test_a_cache_that_cannot_be_written_is_not_the_network(tmp_path, hub, monkeypatch):
    hub.repositories["lab/faces"] = {"config.json": b"{}"}
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file/cache"))
    error = failure_of("hf://lab/faces")
    assert error.where.startswith(str(tmp_path / "file"))
    assert "HF_HUB_CACHE" in error.do
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    error = hub_urls.explain_hub(full, "hf://lab/faces")
    assert (error.where, error.found) == (f"{tmp_path}/file/cache", "No space left on device")
    assert error.do.startswith("free space")
    assert not error.retryable


def test_the_card_says_what_the_network_is(tmp_path):
    run = save_run(tmp_path / "run" / "fold-1", finetuned(3), emotions())
    write_results(tmp_path / "run")
    export(run, str(tmp_path / "out"), "huggingface", overrides={}, license="CC-BY-4.0")
    card = (tmp_path / "out" / "README.md").read_text()
    _, front, text = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] == "cc-by-4.0"
    assert fields["pipeline_tag"] == "video-classification"
    (result,) = fields["model-index"][0]["results"]
    assert result["dataset"]["name"] == "dfew"
    assert result["metrics"] == [{"type": "uar", "name": "UAR (%)", "value": 63.25}]
    for words in (
        "Outputs, in order: happy, sad, neutral.",
        "| UAR (%) | 63.25 | 1.5 | 62.83 |",
        "| sad | 40.5 % |",
        "Labeled set: dfew",
        "Fingerprint of the shards: `data-fingerprint`",
        "EU AI Act",
        "Article 5(1)(f)",
        "## Biases and limits",
        "Weights: CC-BY-4.0.",
    ):
        assert words in text
    # What is published does not say where the files of its author are.
    assert str(tmp_path) not in card
    assert str(tmp_path).encode() not in (tmp_path / "out" / "config.json").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "out" / "model.safetensors").read_bytes()


def write_events(run, *events) -> None:
    lines = [json.dumps(event) for event in events]
    (run / "events.jsonl").write_text("\n".join([*lines, "{cut"]))


def card_of(url, folder) -> tuple[dict, str]:
    """Export; return the card's metadata and text."""
    export(str(url), str(folder), "huggingface", overrides={})
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.mark.parametrize("validation", [0.0, 0.5])
def test_figures_of_other_weights_are_not_published_as_those_of_these(tmp_path, validation):
    """A fine-tuning tests its last weights, or with finetune.validation the best ones."""
    run, config = tmp_path / "run", emotions()
    tuned = config.finetune.model_copy(update={"validation": validation})
    for step in (3, 7):
        save_run(run, finetuned(3), config.model_copy(update={"finetune": tuned}), step)
    best = BestCheckpoint(3, 0.5, "validation 0.5 data")
    write_best(str(run), best)
    write_results(run)
    write_events(run, {"event": "test", "step": 7, "uar": 63.25})
    tested, other = (3, 7) if validation else (7, 3)
    fields, text = card_of(run / f"checkpoints/step-{tested:09d}", tmp_path / "tested")
    assert fields["model-index"][0]["results"][0]["metrics"][0]["value"] == 63.25
    assert "not on these weights" not in text
    fields, text = card_of(run / f"checkpoints/step-{other:09d}", tmp_path / "other")
    assert "model-index" not in fields
    assert f"Measured on step {tested} of this run: **not on these weights**" in text
    assert f"are those of step {other}." in text
    assert "| UAR (%) | 63.25 |" in text


def test_a_test_of_some_folds_is_not_published_as_that_of_all(tmp_path):
    run = save_run(tmp_path / "run" / "fold-1", finetuned(3), emotions())
    write_results(tmp_path / "run", is_complete=False)
    fields, text = card_of(run, tmp_path / "out")
    assert "model-index" not in fields
    assert "Not all folds were tested" in text


def test_a_card_has_what_was_measured_until_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (3, 7):
        save_run(run, pretrained(), recipe(), step)
    write_events(
        run,
        {"event": "probe", "step": 2, "uar": {"linear": 0.3}},
        {"event": "eval", "step": 3, "held_out_loss": 0.75},
        {"event": "probe", "step": 4, "uar": {"linear": 0.4}},
        {"event": "eval", "step": 7, "held_out_loss": 0.5},
    )
    _, text = card_of(run / "checkpoints/step-000000003", tmp_path / "early")
    assert "| UAR of linear on frozen features | 30.00 % | 2 |" in text
    assert "| validation loss | 0.7500 | 3 |" in text
    _, text = card_of(run, tmp_path / "last")
    assert "| UAR of linear on frozen features | 40.00 % | 4 |" in text
    assert "| validation loss | 0.5000 | 7 |" in text


def test_a_card_without_results_promises_none(tmp_path):
    run = tmp_path / "run"
    save_run(run, pretrained(), recipe())
    export(str(run), str(tmp_path / "out"), "huggingface", overrides={})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "None recorded for these weights." in card
    assert 'license: "unknown"' in card
    write_events(
        run,
        {"event": "probe", "step": 1, "uar": {"linear": 0.3}},
        {"event": "probe", "step": 7, "uar": {"linear": 0.4125}},
        {"event": "eval", "step": 7, "held_out_loss": 0.5},
    )
    export(str(run), str(tmp_path / "out"), "huggingface", overrides={})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| UAR of linear on frozen features | 41.25 % | 7 |" in card
    assert "| validation loss | 0.5000 | 7 |" in card
    # An export has no run to read from, and keeps what it knows.
    export(str(tmp_path / "out"), str(tmp_path / "again"), "huggingface", overrides={})
    assert "data-fingerprint" in (tmp_path / "again" / "README.md").read_text()


def test_the_license_of_initial_weights_is_carried_on(tmp_path, caplog):
    base = save_run(tmp_path / "base", pretrained(), recipe())
    imported = str(tmp_path / "imported")
    export(base, imported, "safetensors", overrides={}, license="CC-BY-NC-4.0")
    tuned = emotions()
    tuned = tuned.model_copy(
        update={"finetune": tuned.finetune.model_copy(update={"init": imported})}
    )
    run = save_run(tmp_path / "run", finetuned(3), tuned)
    done = export(run, str(tmp_path / "out"), "huggingface", overrides={})
    assert done.license == "CC-BY-NC-4.0"
    assert open_model(done.weights_url.rpartition("/")[0], {})[0].license == "CC-BY-NC-4.0"
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'license: "cc-by-nc-4.0"' in card
    assert "Commercial use is not permitted" in card
    build = {**BUILD, "num_outputs": 3}
    further = str(tmp_path / "further.safetensors")
    info = ModelInfo.of_run(build, tuned, {})
    weights.save(further, finetuned(3).state_dict(), build, info)
    again = tuned.finetune.model_copy(update={"init": further})
    last = save_run(tmp_path / "last", finetuned(3), tuned.model_copy(update={"finetune": again}))
    done = export(last, str(tmp_path / "twice"), "huggingface", overrides={})
    assert done.license == "CC-BY-NC-4.0", "of the weights that the initial weights began with"
    assert not caplog.records
    export(run, str(tmp_path / "out"), "huggingface", overrides={}, license="MIT")
    assert "License MIT replaces the stored license CC-BY-NC-4.0" in caplog.text
    storage.delete(imported)
    assert export(run, str(tmp_path / "out"), "safetensors", overrides={}).license == ""
    assert "License of the initial weights unknown" in caplog.text


def test_an_unknown_license_of_initial_weights_keeps_an_export_from_the_hub(tmp_path, hub):
    """Runs of earlier versions do not store it; weights that state none are no reason."""
    tuned = emotions()
    init = str(tmp_path / "moved")
    finetune = tuned.finetune.model_copy(update={"init": init})
    run = save_run(tmp_path / "run", finetuned(3), tuned.model_copy(update={"finetune": finetune}))
    words = ["export", run, "--push", "lab/faces"]
    with pytest.raises(ConfigError, match=rf"finetune\.init = {init}.*--license"):
        raise CliRunner().invoke(app, words).exception
    assert hub.repositories == {}
    assert CliRunner().invoke(app, [*words, "--license", "MIT"]).exception is None
    assert b'license: "mit"' in hub.repositories["lab/faces"]["README.md"]
    save_run(tmp_path / "moved", pretrained(), recipe())
    assert CliRunner().invoke(app, words).exception is None
    assert b'license: "unknown"' in hub.repositories["lab/faces"]["README.md"]


def test_videomae_is_imported_with_its_license(tmp_path, monkeypatch):
    build = {"size": "nano", "encoder": "vit", "num_frames": 4, "frame_size": 64}
    monkeypatch.setattr(weights, "read_pth", lambda path: {})
    monkeypatch.setattr(weights, "import_official", lambda state, **_: (build, {"a": CLIPS}))
    done = weights.import_file("x.pth", str(tmp_path), {})
    assert dataclasses.asdict(done)["license"] == "CC-BY-NC-4.0"
    assert "CC-BY-NC-4.0" in done.lines()[-1]
    info = weights.load_info(done.weights_url)
    assert info is not None
    assert info.license == "CC-BY-NC-4.0"
    assert weights.import_file("x.pth", str(tmp_path), {}, "MIT").license == "MIT"
