"""`svfap bench data`: what is counted, and what the figures are made of; no pipeline is run."""

from __future__ import annotations

import mmap
import time

import pytest
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist.bench import data, pipelines
from svfap_dist.bench.pipelines import Rate, Spec
from svfap_dist.config import recipe


@pytest.fixture
def shards(tmp_path) -> str:
    make_video(tmp_path / "in/a.mp4", 61, size=(64, 64))
    sharding.shard("folder", str(tmp_path / "in"), str(tmp_path / "shards"), workers=0)
    return str(tmp_path / "shards")


def spec(batches: int, warm_up: int, cores: int = 1) -> Spec:
    config = recipe.load("svfap_base_voxceleb2", ["train.global_batch_size=64"])
    return Spec(config, "", batches, warm_up, cores)


def test_shares_and_ratios_are_by_cpu_time_of_the_ways_they_name(shards, monkeypatch) -> None:
    """Ours: 40 clips/s by the clock, 20 by CPU time; decoding alone 25, webdataset 4 of these. The
    second round is half as fast."""
    rates = {
        "ours": Rate(400, 10, 20),
        "decode_only": Rate(500, 10, 20),
        "plain_webdataset": Rate(80, 16, 20),
        "dataloader_files": Rate(100, 10, 20),
    }
    specs, turns = {}, []

    def measured(way, asked):
        specs[way.__name__] = asked
        turns.append(way.__name__)
        rate = rates[way.__name__]
        slower = 2 / 3 if turns.count(way.__name__) == 1 else 4 / 3  # of seconds; 1 on the whole
        return Rate(rate.clips, rate.seconds * slower, rate.cpu_seconds * slower, 7.0)

    monkeypatch.setattr(pipelines, "measure", measured)
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


def test_only_batches_after_the_warm_up_are_timed() -> None:
    def endless():
        for number in range(100):
            if number < 3:  # starting up, which takes long
                time.sleep(0.1)
            time.sleep(0.002)
            yield number

    rate = pipelines._timed(endless(), spec(batches=5, warm_up=3))
    assert rate.clips == 5 * 64
    assert 0.01 <= rate.seconds < 0.3
    assert rate.cpu_seconds < 0.2


def test_memory_that_grows_is_seen() -> None:
    def leaking():
        kept = []
        while True:
            kept.append(mmap.mmap(-1, 2**20))  # new pages, whatever the heap has to spare
            kept[-1].write(b"x" * 2**20)
            yield len(kept)

    rate = pipelines._timed(leaking(), spec(batches=40, warm_up=2))
    assert 0.7 * 2**20 < rate.rss_slope_bytes < 1.4 * 2**20


def test_cpu_time_of_processes_below_counts() -> None:
    began = pipelines._cpu_seconds()
    burnt = pipelines.measure(_burn, spec(1, 0)).cpu_seconds
    assert burnt >= 0.2
    assert pipelines._cpu_seconds() - began >= burnt


def _burn(asked: Spec) -> Rate:
    began = time.process_time()
    while time.process_time() - began < 0.25:
        pass
    return Rate(1, 1, pipelines._cpu_seconds())
