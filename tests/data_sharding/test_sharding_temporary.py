"""Two jobs on one output, and what killed ones leave there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from clips import make_video

from data_sharding import pipeline, temporary
from svfap_dist.errors import ConfigError, ShardError, StorageError
from svfap_dist.shards.format import MANIFEST_NAME


def test_a_second_job_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    out = str(tmp_path / "new" / "out")
    with temporary.output_lock(out):
        who = f"Another job is writing.*{out}.*process {os.getpid()}"
        with pytest.raises(ConfigError, match=who), temporary.output_lock(out):
            pass
        with temporary.output_lock(str(tmp_path / "new")):
            pass
    with temporary.output_lock(out):
        pass


def test_a_killed_job_holds_nothing(tmp_path: Path) -> None:
    program = f"""if True:
        import os
        from data_sharding import temporary
        with temporary.output_lock({str(tmp_path)!r}):
            os.kill(os.getpid(), 9)
    """
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    with temporary.output_lock(str(tmp_path)):
        pass


def test_what_killed_jobs_left_unfinished_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = tmp_path / "deep/shard-000000.tar.0123abcd.tmp"
    others = [tmp_path / name for name in ("mine.tmp", "shard-000000.tar", "x.0123abcd.tmp.mp4")]
    for path in (left, *others):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with temporary.output_lock(str(tmp_path)):
        assert not left.exists()
        left.touch()  # by a worker that is ended
    assert not left.exists()
    assert all(path.exists() for path in others)


def test_an_output_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(StorageError, match=r"Cannot write.*file"),
        temporary.output_lock(f"{tmp_path}/file"),
    ):
        pass


@pytest.mark.parametrize("act", ["replaced", "gone"])
def test_a_marker_of_another_job_is_not_taken_for_ours(tmp_path: Path, act: str) -> None:
    make_video(tmp_path / "in/a.mp4", 61, size=(32, 32))
    pipeline.shard("folder", str(tmp_path / "in"), str(tmp_path / "other"), shuffle_seed=1)
    out = tmp_path / "out"

    def other_job(done: int, total: int | None, rejected: int) -> None:
        if (mark := out / "shard-000000.done.json").exists():
            mark.unlink()
            if act == "replaced":
                mark.write_bytes((tmp_path / "other/shard-000000.done.json").read_bytes())

    with pytest.raises(ShardError, match=r"Another job has written.*shard-000000\.done\.json"):
        pipeline.shard("folder", str(tmp_path / "in"), str(out), progress=other_job)
    assert not (out / MANIFEST_NAME).exists()
    assert pipeline.shard("folder", str(tmp_path / "in"), str(out)).num_samples == 1
