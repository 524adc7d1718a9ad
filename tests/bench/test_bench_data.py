"""`svfap bench data`: how its figures follow from rates; no pipeline is run."""

from __future__ import annotations

import dataclasses
import os

import pytest
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist.bench import clip_sets, data
from svfap_dist.config import recipe
from svfap_dist.data.read_ahead import bytes_of_pass
from svfap_dist.errors import ConfigError
from svfap_dist.profiling.timing import Rate
from svfap_dist.shards.format import load_manifest


@pytest.fixture
def shards(tmp_path) -> str:
    make_video(tmp_path / "in/a.mp4", 61, size=(64, 64))
    sharding.shard("folder", str(tmp_path / "in"), str(tmp_path / "shards"), workers=0)
    return str(tmp_path / "shards")


def test_shares_and_ratios_are_by_cpu_time_of_the_ways_they_name(shards, monkeypatch) -> None:
    """Ours: 40 clips/s by the clock, 20 by CPU time; decoding alone 25, webdataset 4 of these. The
    second round is half as fast."""
    rates = {
        "ours": Rate(400, 10, 20, bytes_fetched=800, all_bytes_fetched=1000),
        "decode_only": Rate(500, 10, 20),
        "plain_webdataset": Rate(80, 16, 20),
        "dataloader_files": Rate(100, 10, 20),
    }
    functions = ("time_loader", "_time_decoding", "_time_webdataset", "_time_files")
    names = dict(zip(functions, rates, strict=True))
    specs, turns = {}, []

    def measured(way, asked):
        name = names[way.__name__]
        specs[name] = asked
        turns.append(name)
        rate = rates[name]
        slower = 2 / 3 if turns.count(name) == 1 else 4 / 3  # of seconds; 1 on the whole
        seconds, cpu_seconds = rate.seconds * slower, rate.cpu_seconds * slower
        changed = {"seconds": seconds, "cpu_seconds": cpu_seconds, "rss_slope_bytes": 7.0}
        return dataclasses.replace(rate, **changed)

    monkeypatch.setattr(data, "call_in_new_process", measured)
    found = data.run(shards, "", ["data.decode_workers=3"], batches=8, rounds=2)
    assert turns == [*rates, *rates]
    assert {specs[name].batches for name in ("ours", "decode_only")} == {4}
    assert (found.batches, found.rounds) == (8, 2)
    assert (found.clips_per_second, found.clips_per_cpu_second) == pytest.approx((40, 20))
    assert (found.decode_only, found.decode_only_per_cpu_second) == pytest.approx((50, 25))
    plain = (found.plain_webdataset, found.plain_webdataset_per_cpu_second)
    assert plain == pytest.approx((5, 4))
    files = (found.dataloader_files, found.dataloader_files_per_cpu_second)
    assert files == pytest.approx((10, 5))
    assert (found.share, found.ratio) == (pytest.approx(0.8), pytest.approx(5))
    assert found.rss_slope_bytes == 7
    assert "80% of decoding only, 5.0 times webdataset" in "\n".join(found.lines())
    assert {asked.cores for asked in specs.values()} == {3}  # the same cores for all
    assert specs["plain_webdataset"].files  # of the same clips
    assert found.bytes_fetched_per_clip == pytest.approx(2)
    # One sample, so each of the 8 * 32 clips that a round takes is a pass, from memory.
    assert found.passes == 8 * 32
    assert found.cache_bytes >= found.bytes
    assert found.cached_share == pytest.approx(1 - 1 / found.passes)
    assert found.bytes_read_again == 0
    assert "fits in memory" in "\n".join(found.lines())


def test_local_shards_are_dropped_from_the_page_cache_before_each_measurement(
    shards, monkeypatch
) -> None:
    events: list[str] = []

    def dropped(file: int, start: int, length: int, advice: int) -> None:
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{file}")))

    monkeypatch.setattr(os, "posix_fadvise", dropped)
    monkeypatch.setattr(data, "call_in_new_process", lambda *_: events.append("timed"))
    manifest = load_manifest(shards)
    run = data.PipelineRun(recipe.load("tiny_cpu"), shards, batches=1, warm_up=0)
    data._time_ours(run, manifest)
    assert events == [*(shard.name for shard in manifest.shards), "timed"]


def test_a_pass_fetches_each_byte_once(tmp_path) -> None:
    """64 samples in one pass, in a process of its own: all are fetched."""
    make_video(tmp_path / "in/a.mp4", 64, size=(64, 64))
    sharding.shard(
        "folder",
        str(tmp_path / "in"),
        str(tmp_path / "once"),
        profile="train",
        train=sharding.TrainProfile(region="voxceleb2"),
        workers=0,
    )
    url = str(tmp_path / "train")
    clip_sets.repeat(str(tmp_path / "once"), url, 64)
    overrides = [*data._HERE, "train.global_batch_size=8", "data.decode_workers=0"]
    overrides += ["data.frame_size=64", "data.num_lanes=1", "data.shuffle_block=8"]
    config = recipe.load(data._RECIPE, overrides)
    manifest = load_manifest(url)
    rate = data._time_ours(data.PipelineRun(config, url, 6, 2), manifest)
    assert rate.clips == 48
    passes = rate.all_bytes_fetched / bytes_of_pass(config, manifest)
    assert 0.9 < passes < 2.1  # the first block of the next pass is read ahead


def test_public_pipelines_need_whole_videos(tmp_path) -> None:
    make_video(tmp_path / "in/a.mp4", 64, size=(64, 64))
    url = str(tmp_path / "train")
    sharding.shard("folder", str(tmp_path / "in"), url, profile="train", workers=0)
    with pytest.raises(ConfigError, match="name shards of profile source with --source"):
        data.run(url)
