"""Fixtures of the data plane's tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from numbered_shards import DataSet, video_of, write_data_set

from svfap_dist.shard_format import VideoInfo


@pytest.fixture(scope="session")
def videos() -> list[bytes]:
    """Videos of 60 samples, in which every frame names its sample."""
    return [video_of(sample) for sample in range(60)]


@pytest.fixture
def make_data_set(tmp_path, videos) -> Callable[..., DataSet]:
    """make_data_set([7, 5]) writes two shards; see write_data_set."""

    def make(
        sizes: list[int], replace: dict[int, tuple[bytes, VideoInfo]] | None = None
    ) -> DataSet:
        return write_data_set(str(tmp_path / "shards"), sizes, videos, replace or {})

    return make
