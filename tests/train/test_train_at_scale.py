"""What a start costs the store does not grow with the number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_ranks import recipe_tables, start

from data_sharding.pipeline import shard
from svfap_dist.shards.format import load_manifest

CLIPS, SHARDS, PHASES = 12, 3, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("data") / "shards")
    text = f"clips={CLIPS},frames=16,size=64"
    shard("synthetic", text, url, min_frames=8, profile="train", max_samples_per_shard=4, workers=0)
    assert len(load_manifest(url).shards) == SHARDS
    return url


def test_rank_0_looks_at_the_data_for_all(shards: str, tmp_path: Path) -> None:
    """Sizes of planes are the same on all ranks, though one alone has read samples for them."""
    data = {"colors": "device", "eval_url": shards, "region": "voxceleb2"}
    tables = recipe_tables(shards, str(tmp_path / "run"), data=data)
    (ranks,) = start(2, [("requests_at_start", {"tables": tables})], tmp_path / "ranks")
    first, second = ranks
    assert first["planes"] == second["planes"] is not None
    assert first["loader"]["read"] >= SHARDS  # indexes, and samples
    assert second["loader"] == {}
    # Neither the manifest nor a listing: indexes, and a range of each phase of a shard.
    assert first["validation"] == second["validation"] == {"read": SHARDS * (1 + PHASES)}
