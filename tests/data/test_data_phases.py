"""Batches from shards with a section per phase: the same bits, from a quarter of the bytes."""

from __future__ import annotations

import pytest
import torch
from clips import make_video
from labeled import selection_of, task_config
from loaders import bits, config_of, kept, world

from data_sharding import pipeline
from data_sharding.transcode import TrainProfile
from svfap_dist.config import AugmentConfig, Config
from svfap_dist.data.batch import ClipBatch
from svfap_dist.data.loader import ClipLoader
from svfap_dist.data.selection import Selection
from svfap_dist.shards.format import load_manifest
from svfap_dist.video.frames import YuvClips

LENGTHS = [40, 31, 64, 13, 52, 47, 33, 38, 14, 15, 16, 60, 45, 51, 36, 44]  # frames
STEPS = 2  # an epoch


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("phases")
    for number, length in enumerate(LENGTHS):
        make_video(root / f"in/{number:02d}.mp4", length, size=(64, 64), seed=number)
    for layout in ("samples", "phases"):
        pipeline.shard(
            "folder",
            str(root / "in"),
            str(root / layout),
            profile="train",
            train=TrainProfile("full", crf=1, layout=layout),
            min_frames=13,
            max_samples_per_shard=len(LENGTHS) // 2,
            workers=0,
        )
    return [str(root / layout) for layout in ("samples", "phases")]


def batches_of(url: str, config: Config, selection: Selection | None = None) -> list[ClipBatch]:
    return kept(ClipLoader(config, url, load_manifest(url), world(), selection).batches(0, STEPS))


@pytest.mark.parametrize("order_version", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
def test_batches_do_not_depend_on_where_the_phases_are(urls, stride: int, order_version: int):
    config = config_of(sampling_rate=stride, order_version=order_version, decode_workers=0)
    samples, phases = (list(map(bits, batches_of(url, config))) for url in urls)
    assert samples == phases
    assert len(samples) == STEPS


def test_workers_make_the_same_of_parts(urls):
    config = config_of(sampling_rate=4, decode_workers=2)
    samples, phases = (list(map(bits, batches_of(url, config))) for url in urls)
    assert samples == phases


def test_an_epoch_reads_a_part_of_the_bytes(urls):
    """Neighbors use the same phase, but for a video so short that it has one window only."""
    config = config_of(sampling_rate=4, num_lanes=1, shuffle_block=16, decode_workers=0)
    samples, phases = (
        sum(batch.bytes_fetched for batch in batches_of(url, config)) for url in urls
    )
    assert phases < 0.5 * samples


def test_short_videos_of_a_task_repeat_their_last_frame(urls):
    """The last frame may be of another phase than the window's start."""
    config = task_config(sampling_rate=8, decode_workers=0)
    assert config.data.window > min(LENGTHS)
    selection = selection_of(range(len(LENGTHS)))
    samples, phases = (list(map(bits, batches_of(url, config, selection))) for url in urls)
    assert samples == phases


def test_planes_of_a_task_become_what_its_workers_would_make(urls):
    """Short videos included; colors are converted where clips are augmented."""
    device, selection = AugmentConfig(run_on="device"), selection_of(range(len(LENGTHS)))
    data = {"sampling_rate": 8, "crop_scales": (1.0, 0.66), "decode_workers": 0}
    rgb = batches_of(urls[1], task_config(device, **data), selection)
    config = task_config(device, **data, colors="device")
    loader = ClipLoader(config, urls[1], load_manifest(urls[1]), world(), selection)
    for batch, expected in zip(loader.batches(0, STEPS), rgb, strict=True):
        assert isinstance(batch.frames, YuvClips)
        assert batch.bad == []
        frames = batch.frames_on(torch.device("cpu"), slice(None))
        assert torch.equal(frames, expected.frames)
        assert torch.equal(batch.digests, expected.digests)
