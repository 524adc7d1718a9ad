"""`svfap bench data`: how its figures follow from rates; no pipeline is run."""

from __future__ import annotations

import pytest
from clips import make_video

from data_sharding import pipeline as sharding
from svfap_dist.bench import data
from svfap_dist.profiling.timing import Rate


@pytest.fixture
def shards(tmp_path) -> str:
    make_video(tmp_path / "in/a.mp4", 61, size=(64, 64))
    sharding.shard("folder", str(tmp_path / "in"), str(tmp_path / "shards"), workers=0)
    return str(tmp_path / "shards")


def test_shares_and_ratios_are_by_cpu_time_of_the_ways_they_name(shards, monkeypatch) -> None:
    """Ours: 40 clips/s by the clock, 20 by CPU time; decoding alone 25, webdataset 4 of these. The
    second round is half as fast."""
    rates = {
        "ours": Rate(400, 10, 20),
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
        return Rate(rate.clips, rate.seconds * slower, rate.cpu_seconds * slower, 7.0)

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
