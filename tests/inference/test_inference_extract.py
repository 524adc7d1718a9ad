"""Features and predictions of files, folders and shards, as the command line gives them."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from clips import make_video
from made_networks import CLASSES, emotions, finetuned, pretrained, recipe, save_run, traits
from typer.testing import CliRunner

import svfap_dist
from data_sharding import pipeline as sharding
from data_sharding.transcode import TrainProfile
from svfap_dist.cli.app import app
from svfap_dist.errors import (
    CheckpointError,
    ConfigError,
    DecodeError,
    HealthError,
    StorageError,
)
from svfap_dist.evaluate import runner, video_workers
from svfap_dist.inference import videos
from svfap_dist.inference.videos import read_video
from svfap_dist.video import backends
from svfap_dist.video.frames import whole_frames
from svfap_dist.video.probe import Limits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Videos of 33 (wide ones), 20 and 3 frames, and one that is none."""
    path = tmp_path_factory.mktemp("videos")
    for name, frames in (("a", 33), ("b", 20), ("c", 3)):
        width = 80 if name == "a" else 64
        make_video(path / f"{name}.mp4", frames, size=(width, 64), seed=frames)
    (path / "junk.mp4").write_bytes(b"junk")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "pretrained", pretrained(), recipe())


def clip_at(path, start: int, network) -> torch.Tensor:
    """The clip of every second frame from `start` on, the middle of it, the straightforward way."""
    sample = read_video(str(path))
    info = sample.info
    frames = whole_frames(backends.decode(sample.video, info, range(info.num_frames)))
    left = (frames.shape[2] - 64) // 2
    frames = frames[:, :, left : left + 64]
    numbers = [min(start + 2 * k, len(frames) - 1) for k in range(4)]
    return torch.from_numpy(frames[numbers]).unsqueeze(0)


def test_features_are_those_of_the_windows(folder, run):
    network = svfap_dist.load(run)
    found = svfap_dist.extract(network, folder / "a.mp4")
    assert found.dtype == np.float32
    starts = [0, 8, 16, 24, 26]
    with torch.no_grad():
        expected = [network(clip_at(folder / "a.mp4", start, network))[0] for start in starts]
    torch.testing.assert_close(torch.from_numpy(found), torch.stack(expected))
    data = (folder / "a.mp4").read_bytes()
    np.testing.assert_array_equal(svfap_dist.extract(network, data), found)
    assert len(svfap_dist.extract(network, str(folder / "a.mp4"), step=1)) == 27
    assert svfap_dist.extract(network, folder / "c.mp4").shape == (1, 32)
    with pytest.raises(DecodeError, match=r"junk.mp4. Found: unreadable"):
        svfap_dist.extract(network, folder / "junk.mp4")
    with pytest.raises(DecodeError, match="missing"):
        svfap_dist.extract(network, folder / "none.mp4")
    with pytest.raises(ConfigError, match="step"):
        svfap_dist.extract(network, folder / "a.mp4", step=-1)


def test_many_videos_become_one_file(folder, run, tmp_path):
    output = tmp_path / "features.npz"
    missing = str(folder / "missing.mp4")
    arguments = ["extract", run, str(folder), missing, "-o", str(output), "--json", "--threads=2"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert (said["videos"], said["clips"], said["dim"]) == (3, 9, 32)
    assert [reason.partition(":")[0] for _, reason in said["rejected"]] == ["unreadable", "missing"]
    network = svfap_dist.load(run)
    with np.load(output) as found:
        keys = [str(folder / f"{name}.mp4") for name in "abc"]
        assert found["keys"].tolist() == keys
        assert found["fps"].tolist() == [25, 25, 25]
        assert found["num_frames"].tolist() == [33, 20, 3]
        assert found["videos"].tolist() == [0] * 5 + [1] * 3 + [2]
        assert found["starts"].tolist() == [0, 8, 16, 24, 26, 0, 8, 13, 0]
        assert found["rejected"].tolist() == [str(folder / "junk.mp4"), missing]
        for number, key in enumerate(keys):
            features = found["features"][found["videos"] == number]
            np.testing.assert_allclose(features, svfap_dist.extract(network, key), atol=1e-5)


def test_a_file_above_the_limit_is_never_read(folder, monkeypatch):
    monkeypatch.setattr(videos, "Limits", functools.partial(Limits, file_bytes=1000))
    monkeypatch.setattr(videos.storage, "read_bytes", None)
    found = videos.fetch_video(str(folder / "a.mp4"))
    assert (found.key, found.reason) == (str(folder / "a.mp4"), "too_big")
    size = (folder / "a.mp4").stat().st_size
    assert found.detail == f"{size} bytes, more than 1000"


@pytest.mark.parametrize("verb", ["extract", "parquet", "predict"])
def test_a_video_that_hangs_costs_only_itself(folder, tmp_path, monkeypatch, verb):
    """The deadline is proportional to the size, so the empty file has no time."""
    quick = functools.partial(Limits, seconds=0, seconds_per_mib=1e6)
    monkeypatch.setattr(video_workers, "Limits", quick)
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "aa.mp4").write_bytes(b"")
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    outputs = {
        "extract": ["-o", str(tmp_path / "x.npz")],
        "parquet": ["-o", str(tmp_path / "x"), "--format=parquet"],
        "predict": [],
    }
    command = ["predict" if verb == "predict" else "extract", run, str(tmp_path), *outputs[verb]]
    done = CliRunner().invoke(app, [*command, "--json", "--threads=2"])
    assert done.exception is None
    said = json.loads(done.stdout)
    ((key, reason),) = said["rejected"]
    assert (key, reason[:5]) == (str(tmp_path / "aa.mp4"), "hung:")
    assert (len(said["predictions"]) if verb == "predict" else said["videos"]) == 2
    assert multiprocessing.active_children() == []


def test_a_call_from_python_starts_no_process(folder, run, monkeypatch):
    monkeypatch.setattr(video_workers, "ProcessPool", None)
    assert len(svfap_dist.extract(svfap_dist.load(run), folder / "b.mp4")) == 3


@pytest.mark.parametrize("profile", ["source", "train"])
def test_shards_give_the_same_as_files(folder, run, tmp_path, profile):
    sharding.shard(
        "folder",
        str(folder),
        str(tmp_path / "shards"),
        profile=profile,
        train=TrainProfile(region="centre", crf=1) if profile == "train" else None,
        min_frames=7,
        workers=1,
    )
    output = tmp_path / "features.npz"
    arguments = ["extract", run, str(tmp_path / "shards"), "-o", str(output)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    network = svfap_dist.load(run)
    with np.load(output) as found:
        assert sorted(found["keys"].tolist()) == ["a", "b"]  # in the order of the shards
        assert found["labels"].tolist() == ["{}", "{}"]
        for number, key in enumerate(found["keys"]):
            expected = svfap_dist.extract(network, folder / f"{key}.mp4")
            features = found["features"][found["videos"] == number]
            np.testing.assert_allclose(
                features, expected, atol=1e-5 if profile == "source" else 0.2
            )


def test_predictions_are_means_over_the_windows_of_the_test(folder, tmp_path):
    model = finetuned(3)
    run = save_run(tmp_path / "run", model, emotions())
    done = CliRunner().invoke(app, ["predict", run, str(folder), "--json"])
    assert done.exit_code == 0
    said = json.loads(done.stdout)
    assert [key for key, _ in said["rejected"]] == [str(folder / "junk.mp4")]
    network = svfap_dist.load(run)
    assert len(said["predictions"]) == 3
    for found, starts in zip(said["predictions"], ([0, 26], [0, 13], [0]), strict=True):
        with torch.no_grad():
            views = [network(clip_at(found["key"], s, network)).softmax(1)[0] for s in starts]
        expected = torch.stack(views).mean(0)
        assert list(found["scores"]) == list(CLASSES)
        torch.testing.assert_close(torch.tensor(list(found["scores"].values())), expected)
        assert found["label"] == CLASSES[int(expected.argmax())]
    plain = CliRunner().invoke(app, ["predict", run, str(folder / "a.mp4")])
    assert plain.stdout.startswith(f"{folder / 'a.mp4'}: {said['predictions'][0]['label']}  (")


def test_a_regression_names_its_values(folder, tmp_path):
    run = save_run(tmp_path / "run", finetuned(2), traits("sigmoid"))
    done = CliRunner().invoke(app, ["predict", run, str(folder / "a.mp4"), "--json"])
    (found,) = json.loads(done.stdout)["predictions"]
    assert found["label"] is None
    assert list(found["scores"]) == ["openness", "extraversion"]
    assert all(0 < value < 1 for value in found["scores"].values())


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (["predict", "RUN", "a.mp4"], CheckpointError, "no labels.*svfap finetune"),
        (["extract", "RUN", "a.mp4", "a.mp4", "-o", "x.npz"], ConfigError, "given twice"),
        (["extract", "RUN", "a.mp4", "-o", "x.npz"], DecodeError, "a.mp4. Found: missing"),
        (["extract", "RUN", "a.mp4", "-o", "x.npz", "--device", "xpu9"], ConfigError, "xpu9"),
        (["export", "RUN", "-o", "x", "--format", "tflite"], ConfigError, "onnx or torch-export"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(
    run, tmp_path, monkeypatch, arguments, error, words
):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, [run if word == "RUN" else word for word in arguments])
    with pytest.raises(error, match=words):
        raise done.exception
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "options", "error", "words"),
    [
        ("features.parquet", [], ConfigError, "--format parquet"),
        ("features/", [], ConfigError, "--format parquet"),
        ("folder", [], ConfigError, "a folder.*--format parquet"),
        ("file/x.npz", [], StorageError, "Cannot write.*file/x.npz"),
        ("x.npz", ["--format", "parquet"], ConfigError, "--format npz"),
        ("file", ["--format", "parquet"], ConfigError, "--format npz"),
        ("file/x", ["--format", "parquet"], StorageError, "Cannot write.*file/x/part-000000"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    folder, run, tmp_path, monkeypatch, output, options, error, words
):
    def never(*_):
        raise AssertionError("a video was opened")

    monkeypatch.setattr(runner, "_open", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"kept")
    # All but the last one are found before the network is loaded.
    network = run if error is StorageError and options else "no-such-network"
    arguments = ["extract", network, str(folder / "a.mp4"), "-o", output, *options]
    done = CliRunner().invoke(app, arguments)
    with pytest.raises(error, match=words):
        raise done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert (tmp_path / "file").read_bytes() == b"kept"


def save_broken(folder, value: float) -> str:
    """A fine-tuned run whose head has a value that is not finite, or makes all outputs so."""
    model = finetuned(3)
    with torch.no_grad():
        if np.isfinite(value):
            model.head.weight.fill_(value)
        else:
            model.head.bias[1] = value
    return save_run(folder, model, emotions())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("verb", ["predict", "extract", "export"])
def test_a_network_that_computes_nan_is_an_error(folder, tmp_path, verb, value):
    url, out = save_broken(tmp_path / "run", value), tmp_path / "out"
    inputs = {"predict": [str(folder / "a.mp4"), "--json"], "export": ["-o", str(out)]}
    inputs["extract"] = [str(folder / "a.mp4"), "-o", str(out)]
    done = CliRunner().invoke(app, [verb, url, *inputs[verb]])
    if value == 3e38 and verb != "predict":  # the features are finite
        assert done.exception is None
        return
    with pytest.raises((CheckpointError, HealthError), match="not finite"):
        raise done.exception
    assert "NaN" not in done.stdout
    assert not out.exists()


def test_a_name_that_is_not_text_is_printed_with_an_escape(folder, tmp_path):
    """As a process with a UTF-8 locale: the last video of the folder must be predicted, too."""
    name = b"caf\xe9.mp4"
    for source, target in {"a.mp4": b"a.mp4", "b.mp4": name, "junk.mp4": b"junk-" + name}.items():
        (tmp_path / "d").mkdir(exist_ok=True)
        (tmp_path / "d" / os.fsdecode(target)).write_bytes((folder / source).read_bytes())
    run = save_run(tmp_path / "run", finetuned(3), emotions())
    for verb in (["predict"], ["extract", "-o", str(tmp_path / "x.npz")]):
        done = subprocess.run(
            [sys.executable, "-m", "svfap_dist", *verb, run, str(tmp_path / "d")],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:strict"},
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout.decode()
        assert "left out " in said
        assert "junk-caf\\udce9.mp4: unreadable" in said
        if verb == ["predict"]:
            assert "d/caf\\udce9.mp4: " in said
            assert "d/a.mp4: " in said
    with np.load(tmp_path / "x.npz") as found:
        assert os.fsencode(found["keys"][1]) == os.fsencode(tmp_path) + b"/d/" + name
