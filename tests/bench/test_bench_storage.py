"""`svfap bench storage`: both clients of S3 are measured, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

from svfap_dist import storage
from svfap_dist.bench import storage as bench


def test_both_clients_are_measured_for_each_size(s3_bucket: str) -> None:
    found = bench.run(s3_bucket, sizes=(1000, 5000), total_bytes=20_000, threads=2, rounds=1)
    assert [(row.client, row.range_bytes, row.requests) for row in found.rows] == [
        ("training", 1000, 20),
        ("s3fs", 1000, 20),
        ("training", 5000, 4),
        ("s3fs", 5000, 4),
    ]
    assert all(row.cpu_ms_per_request > 0 for row in found.rows)
    assert storage.list_files(s3_bucket) == {}


def test_a_folder_has_one_way_of_reading(tmp_path: Path) -> None:
    found = bench.run(str(tmp_path), sizes=(1000,), total_bytes=5000, rounds=2)
    assert [(row.client, row.requests) for row in found.rows] == [("training", 5)]
    assert "training" in found.lines()[2]
