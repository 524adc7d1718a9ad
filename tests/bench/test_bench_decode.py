"""`svfap bench decode`: a whole run on small videos, its numbers held against each other."""

from __future__ import annotations

import json

import pytest
from clips import make_video
from typer.testing import CliRunner

from svfap_dist import cli
from svfap_dist.bench import decode
from svfap_dist.errors import ConfigError


def test_printed_figures_add_up(tmp_path) -> None:
    for seed in range(2):
        make_video(tmp_path / f"{seed}.mp4", 70, size=(112, 112), seed=seed)
    words = ["bench", "decode", "--videos", str(tmp_path), "--rounds", "1", "--json"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["videos"] == 2
    assert found["ratio"] == pytest.approx(found["train"] / found["source_rgb"])
    assert found["converted_ratio"] == pytest.approx(found["train_converted"] / found["source_rgb"])
    assert found["backends"]["pyav"] == found["train"]
    assert found["train_converted"] < found["train"]
    assert found["psnr_db"] > 30
    videos = decode.videos_by_profile(str(tmp_path))
    sizes = {name: sum(len(data) for data, _ in made) for name, made in videos.items()}
    assert found["bytes_ratio"] == pytest.approx(sizes["train"] / sizes["source"])


def test_the_baseline_reads_the_same_frames_as_we_do() -> None:
    data = make_video(None, 80, encoder_options={"bf": "2"})
    (video,) = [(data, info) for info in [decode.probe(data, 61)]]
    for start in (0, 7, 19):
        ours = decode.whole_frames(decode._decode_window(video, start))
        assert (decode._decode_by_to_ndarray(video, start) == ours).mean() > 0.99


def test_a_folder_without_videos_is_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match="No video to measure"):
        decode.run(str(tmp_path), 1)
