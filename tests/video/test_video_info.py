"""What a sample's JSON says: the keys and names of shard format 1, whatever the code calls them."""

from __future__ import annotations

import json

import pytest

from data_sharding import pipeline
from svfap_dist.errors import ConfigError
from svfap_dist.video.info import (
    Crop,
    PhaseFile,
    PhaseLayout,
    VideoInfo,
    dump_info,
    load_info,
    region_crop,
    stored_region,
)

FILE = PhaseFile(48, (700, 31))
LAYOUT = PhaseLayout(4, 16, "AWQ=", (FILE,), "center", 0, 32, 160, 160, 224, 224)
INFO = VideoInfo(61, 25.0, 160, 160, "h264", layout=LAYOUT)


def test_the_keys_on_disk_are_those_of_the_first_shards():
    fields = json.loads(dump_info(INFO))
    assert "layout" not in fields
    assert fields["order"]["region"] == "centre"
    assert load_info(dump_info(INFO)) == INFO


@pytest.mark.parametrize("name", ["center", "centre"])
def test_both_names_of_the_central_square_are_understood(name):
    assert region_crop(name, 100, 60) == Crop(20, 0, 60, 60)
    assert stored_region(INFO, name) == Crop(0, 0, 160, 160)
    with pytest.raises(ConfigError, match=r"data\.region=center"):
        stored_region(INFO, "full")


def test_the_old_name_gives_the_same_data_set_with_a_warning(caplog):
    profiles = [
        pipeline.train_profile(region=name, size=None, crf=None) for name in ("centre", "center")
    ]
    assert profiles[0] == profiles[1]
    assert profiles[0].stored()["region"] == "centre"  # the manifests of before say so
    assert [record.message for record in caplog.records] == [
        "--region centre is now called center; the old name still works."
    ]
