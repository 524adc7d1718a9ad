"""The measurement of DALI's pipelines, run on its CPU backend."""

from __future__ import annotations

import pytest
from golden import GOLDEN

from svfap_dist.bench import decode_device
from svfap_dist.config import DataConfig
from svfap_dist.errors import ConfigError, DecodeError
from svfap_dist.video.backends import BACKENDS

pytestmark = pytest.mark.skipif(not BACKENDS["dali"].is_installed, reason="DALI is not installed")

SMALL = DataConfig(num_frames=4, frame_size=32)


def test_a_row_for_each_profile_and_number_of_pipelines(monkeypatch):
    monkeypatch.setattr(decode_device, "_SECONDS", 0.05)
    profiles = {
        profile: [(GOLDEN[name]().video, GOLDEN[name]().info)]
        for profile, name in (("source", "vp9-webm"), ("train", "vp9-phase-ordered"))
    }
    result = decode_device.run(
        profiles, device="cpu", pipelines=(1, 2), batch_size=4, threads=1, data=SMALL,
        model_clips_per_second=12.0,
    )  # fmt: skip
    found = [(row.profile, row.pipelines) for row in result.rows]
    assert found == [("source", 1), ("source", 2), ("train", 1), ("train", 2)]
    assert all(row.clips_per_second > 0 and row.cpu_seconds_per_clip > 0 for row in result.rows)
    assert sum("pipelines" in line for line in result.lines()) == 4
    assert "The model takes" in result.lines()[-1]


def test_a_bad_video_is_an_error_and_not_a_rate():
    golden = GOLDEN["h264"]()
    with pytest.raises(DecodeError):
        decode_device.run({"source": [(golden.video[:700], golden.info)]}, device="cpu", data=SMALL)


def test_without_a_gpu():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="No GPU"):
        decode_device.run({})
