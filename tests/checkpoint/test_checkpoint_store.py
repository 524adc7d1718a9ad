from __future__ import annotations

import functools
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from svfap_dist import storage
from svfap_dist.checkpoint import local_copies, store
from svfap_dist.checkpoint.local_copies import LocalCopy
from svfap_dist.checkpoint.saver import Checkpointer
from svfap_dist.checkpoint.store import TrainState
from svfap_dist.cli import checkpoints
from svfap_dist.config import Config, recipe
from svfap_dist.distributed import World
from svfap_dist.errors import (
    CheckpointError,
    ClusterError,
    ConfigError,
    HealthError,
    SvfapError,
)
from svfap_dist.model import weights
from svfap_dist.train.objective import build_objective

ALONE = World(rank=0, local_rank=0, world_size=1, local_world_size=1)
FIRST_OF_TWO = World(rank=0, local_rank=0, world_size=2, local_world_size=2)


class SmallEngine:
    """Writes a shard and returns weights, as `Engine` does through DeepSpeed."""

    def __init__(self) -> None:
        self.objective = build_objective(a_config("-"))

    def save(self, folder: str, tag: str) -> None:
        path = Path(folder, tag)
        path.mkdir()
        (path / "shard-of-rank-0.pt").write_bytes(b"optimizer state")

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"weight": torch.arange(4.0)}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "local"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def a_config(url: str | Path, **train: Any) -> Config:
    return recipe.from_tables({"run": {"url": str(url)}, "train": train}, where="test")


def begin(checkpointer: Checkpointer, step: int) -> None:
    engine: Any = SmallEngine()
    checkpointer.save(engine, TrainState.of_run(a_config("-"), step, 10, "m", 1))


def end(checkpointer: Checkpointer) -> str:
    """The error that the upload ended with, "" for none."""
    outcome = checkpointer.finish_upload()
    assert outcome is not None
    return outcome.error


def save(config: Config, *steps: int) -> list[str]:
    """Save checkpoints one after the other; the errors they ended with."""
    errors = []
    with Checkpointer(config, ALONE, before_marker=lambda: None) as checkpointer:
        for step in steps:
            begin(checkpointer, step)
            errors.append(end(checkpointer))
    return errors


def folder_of(url: str | Path, step: int) -> Path:
    return Path(store.checkpoint_url(str(url), step))


def test_a_checkpoint_is_whole_and_says_what_it_is(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    assert save(config, 30) == [""]
    assert store.latest_committed(str(tmp_path)) == 30
    assert store.read_state(str(tmp_path), 30).step == 30
    store.verify(str(tmp_path), 30)
    build, tensors = weights.load(str(folder_of(tmp_path, 30) / store.WEIGHTS))
    assert build["size"] == config.model.size
    assert torch.equal(tensors["weight"], torch.arange(4.0))
    rows = json.loads((folder_of(tmp_path, 30) / store.FILES).read_text())["files"]
    assert {row["name"] for row in rows} == {
        "shard-of-rank-0.pt",
        "state.json",
        "model.safetensors",
    }


def test_verbs_of_a_run_refuse_the_url_of_a_checkpoint(tmp_path: Path) -> None:
    save(a_config(tmp_path), 30)
    checkpoints.checkpoint_verify(str(tmp_path))
    for verb in (checkpoints.checkpoint_ls, checkpoints.checkpoint_verify):
        with pytest.raises(ConfigError, match=r"one checkpoint.*give the run\.url"):
            verb(str(folder_of(tmp_path, 30)))


class MovingEngine(SmallEngine):
    """Continues to train in the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = {"weight": torch.arange(4.0)}

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.weights


def test_training_waits_for_a_copy_of_the_weights_and_not_for_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine: Any = MovingEngine()
    goes_on, write = threading.Event(), weights.save

    def slowly(*arguments: Any) -> None:
        assert goes_on.wait(20), "training waits for the file"
        write(*arguments)

    monkeypatch.setattr(weights, "save", slowly)
    with Checkpointer(a_config(tmp_path), ALONE, before_marker=lambda: None) as checkpointer:
        checkpointer.save(engine, TrainState.of_run(a_config("-"), 1, 10, "m", 1))
        engine.weights["weight"].zero_()
        goes_on.set()
        assert end(checkpointer) == ""
    _, tensors = weights.load(str(folder_of(tmp_path, 1) / store.WEIGHTS))
    assert torch.equal(tensors["weight"], torch.arange(4.0))


def test_no_room_for_the_weights_is_a_checkpoint_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save", full)
    (error,) = save(a_config(tmp_path), 1)
    assert "local disk" in error
    assert "TMPDIR" in error
    assert store.committed_steps(str(tmp_path)) == []


def test_the_local_copy_goes(tmp_path: Path, own_temporary_folder: Path) -> None:
    save(a_config(tmp_path), 1)
    assert os.listdir(own_temporary_folder) == []


def test_local_copy_of_the_newest_checkpoint_is_read_after_a_kill(
    tmp_path: Path, own_temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, downloaded = str(tmp_path / "run"), []
    config = a_config(run)
    killed = Checkpointer(config, ALONE, before_marker=lambda: None)  # never left
    for step in (1, 2):
        begin(killed, step)
        assert end(killed) == ""
    (copy,) = local_copies.find(run)  # only the newest stays
    download = storage.download_file

    def counted(url: str, local: str) -> None:
        downloaded.append(Path(local).name)
        download(url, local)

    monkeypatch.setattr(storage, "download_file", counted)
    name = "shard-of-rank-0.pt"
    store.fetch(run, 2, str(tmp_path / "fetched"), names=(name, store.STATE))
    assert downloaded == []
    assert (tmp_path / "fetched" / name).read_bytes() == b"optimizer state"

    Path(copy, store.checkpoint_tag(2), name).write_bytes(b"optimizer stat3")  # of the same size
    store.fetch(run, 2, str(tmp_path / "again"), names=(name, store.STATE))
    assert downloaded == [name]
    assert (tmp_path / "again" / name).read_bytes() == b"optimizer state"

    local_copies.remove_others(run, store.checkpoint_tag(2))
    assert local_copies.find(run) == [copy]
    local_copies.remove_others(run, store.checkpoint_tag(1))
    assert os.listdir(own_temporary_folder) == []


def test_local_copy_goes_at_the_end_and_stays_after_an_error(
    tmp_path: Path, own_temporary_folder: Path
) -> None:
    config = a_config(tmp_path / "run")
    failed = Checkpointer(config, ALONE, lambda: None)
    begin(failed, 1)
    end(failed)
    failed.__exit__(RuntimeError)
    (left,) = os.listdir(own_temporary_folder)
    with Checkpointer(config, ALONE, lambda: None) as checkpointer:
        begin(checkpointer, 2)
        end(checkpointer)
        assert left not in os.listdir(own_temporary_folder)
    assert os.listdir(own_temporary_folder) == []


@pytest.mark.parametrize(("error", "stays"), [(ClusterError, True), (HealthError, False)])
def test_local_copy_goes_after_an_error_that_no_restart_fixes(
    tmp_path: Path, own_temporary_folder: Path, error: type[SvfapError], stays: bool
) -> None:
    def save_and_fail() -> None:
        with Checkpointer(a_config(tmp_path / "run"), ALONE, lambda: None) as checkpointer:
            begin(checkpointer, 1)
            end(checkpointer)
            raise error("Planted", "here", "nothing", "nothing")

    with pytest.raises(error):
        save_and_fail()
    assert bool(os.listdir(own_temporary_folder)) == stays


def test_old_copies_of_runs_that_do_not_run_are_removed_by_another_run(
    tmp_path: Path, own_temporary_folder: Path
) -> None:
    names = ("runs", "failed", "has just failed", "own")
    copies = {name: LocalCopy(str(tmp_path / name), 0) for name in names}
    (own_temporary_folder / "svfap-step-000000004-x").mkdir()
    for path in own_temporary_folder.iterdir():
        os.utime(path, (0, 0))
    for name in names[1:]:
        copies[name].close()
    os.utime(copies["has just failed"].path)
    with Checkpointer(a_config(tmp_path / "own"), ALONE, lambda: None):
        left = set(map(str, own_temporary_folder.iterdir()))
    assert left == {copy.path for name, copy in copies.items() if name != "failed"}


def test_a_node_reads_the_files_of_its_own_ranks(tmp_path: Path) -> None:
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(12)]
    shared = "mp_rank_00_model_states.pt"
    for name in [*names, shared, store.WEIGHTS, store.STATE]:
        storage.write_bytes(str(tmp_path / "part" / name), name.encode())
    url = store.checkpoint_url(str(tmp_path / "run"), 1)
    store.commit(url, store.upload(str(tmp_path / "part"), url))
    store.fetch(str(tmp_path / "run"), 1, str(tmp_path / "own"), ranks={1, 10})
    assert sorted(os.listdir(tmp_path / "own")) == sorted([names[1], names[10], shared])
    store.fetch(str(tmp_path / "run"), 1, str(tmp_path / "all"))
    assert sorted(os.listdir(tmp_path / "all")) == sorted([*names, shared])


def test_commit_is_written_last_and_removed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("write_bytes", "upload_file", "delete"):

        def noted(call: Any, name: str, *arguments: Any) -> None:
            calls.append(f"{name} {arguments[1 if name == 'upload_file' else 0]}")
            call(*arguments)

        monkeypatch.setattr(storage, name, functools.partial(noted, getattr(storage, name), name))
    save(a_config(tmp_path, keep_last=1), 1, 2)
    first, second = (store.checkpoint_url(str(tmp_path), step) for step in (1, 2))
    writes = [call for call in calls if second in call and not call.startswith("delete")]
    assert writes[-1] == f"write_bytes {second}/COMMIT"
    assert writes[-2] == f"write_bytes {second}/files.json"
    after_commit = calls[calls.index(writes[-1]) + 1 :]
    assert after_commit == [f"delete {first}/COMMIT", f"delete {first}"]


def test_journal_is_stored_before_commit(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    seen: list[bool] = []
    commit = folder_of(tmp_path, 1) / store.COMMIT
    with Checkpointer(config, ALONE, lambda: seen.append(commit.exists())) as checkpointer:
        begin(checkpointer, 1)
        assert end(checkpointer) == ""
    assert seen == [False]
    assert commit.exists()


def cut_a_file_short(folder: Path) -> None:
    (folder / "shard-of-rank-0.pt").write_bytes(b"opt")


def lose_a_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_the_list(folder: Path) -> None:
    (folder / store.FILES).unlink()


def alter_the_list(folder: Path) -> None:
    (folder / store.FILES).write_text('{"files": []}')


@pytest.mark.parametrize("damage", [cut_a_file_short, lose_a_file, lose_the_list, alter_the_list])
def test_a_damaged_newest_is_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    save(a_config(tmp_path), 1, 2)
    damage(folder_of(tmp_path, 2))
    with caplog.at_level(logging.WARNING):
        assert store.latest_committed(str(tmp_path)) == 1
    assert str(folder_of(tmp_path, 2)) in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        store.verify(str(tmp_path), 2)
    save(a_config(tmp_path), 2)  # the resumed run comes by again
    assert store.latest_committed(str(tmp_path)) == 2


def test_a_flipped_bit_is_found_by_digests(tmp_path: Path) -> None:
    save(a_config(tmp_path), 1)
    (folder_of(tmp_path, 1) / "shard-of-rank-0.pt").write_bytes(b"optimizer statf")
    with pytest.raises(CheckpointError, match=r"shard-of-rank-0.*its digest differs"):
        store.verify(str(tmp_path), 1)


def test_a_kill_before_commit_leaves_nothing_to_believe(tmp_path: Path) -> None:
    save(a_config(tmp_path), 1, 2)
    (folder_of(tmp_path, 2) / store.COMMIT).unlink()
    assert store.latest_committed(str(tmp_path)) == 1
    assert store.committed_steps(str(tmp_path)) == [1]
    with pytest.raises(CheckpointError, match="not committed"):
        store.verify(str(tmp_path), 2)
    save(a_config(tmp_path), 3)  # and what was left is swept up
    assert not folder_of(tmp_path, 2).exists()


def test_old_checkpoints_go_as_the_recipe_says(tmp_path: Path) -> None:
    save(a_config(tmp_path, keep_last=2, keep_every=3), *range(1, 8))
    assert store.committed_steps(str(tmp_path)) == [3, 6, 7]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        store.checkpoint_tag(step) for step in (3, 6, 7)
    ]


def test_only_a_marker_of_this_save_counts(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    url = store.checkpoint_url(str(tmp_path), 1)
    with Checkpointer(config, FIRST_OF_TWO, before_marker=lambda: None) as checkpointer:
        begin(checkpointer, 1)
        while not (markers := [n for n in storage.list_files(url) if n.startswith("ranks/")]):
            time.sleep(0.01)
        mine = markers[0]
        storage.write_bytes(f"{url}/ranks/rank-00001.0123456789ab.json", b"[]")  # a dead attempt's
        assert not checkpointer.upload_ended
        storage.write_bytes(f"{url}/{mine.replace('rank-00000', 'rank-00001')}", b"[]")
        assert end(checkpointer) == ""
    assert store.latest_committed(str(tmp_path)) == 1


def test_without_all_ranks_there_is_no_commit(tmp_path: Path) -> None:
    config = a_config(tmp_path)
    with Checkpointer(config, FIRST_OF_TWO, before_marker=lambda: None) as checkpointer:
        begin(checkpointer, 1)
    assert store.latest_committed(str(tmp_path)) is None


def refuse_writes(url: Path) -> None:
    """Make the store fail: where the checkpoints' folder should be there is a file."""
    (url / "checkpoints").write_text("in the way")


def test_one_failed_upload_is_told_and_two_end_the_run(tmp_path: Path) -> None:
    refuse_writes(tmp_path)
    config = a_config(tmp_path)
    with Checkpointer(config, ALONE, before_marker=lambda: None) as checkpointer:
        begin(checkpointer, 1)
        assert "checkpoints" in end(checkpointer)
        begin(checkpointer, 2)
        with pytest.raises(CheckpointError, match="2 checkpoints in a row"):
            checkpointer.finish_upload()


def test_a_success_forgives_the_failure_before_it(tmp_path: Path) -> None:
    refuse_writes(tmp_path)
    config = a_config(tmp_path)
    with Checkpointer(config, ALONE, before_marker=lambda: None) as checkpointer:
        for step, works in ((1, False), (2, True), (3, False), (4, True)):
            blocked = tmp_path / "checkpoints"
            if works:
                blocked.unlink()
            elif step > 1:
                blocked.rename(tmp_path / f"before-{step}")
                refuse_writes(tmp_path)
            begin(checkpointer, step)
            assert (end(checkpointer) == "") == works


def test_an_object_store_holds_checkpoints_too(s3_bucket: str) -> None:
    url = f"{s3_bucket}/run"
    assert save(a_config(url, keep_last=1), 1, 2) == ["", ""]
    assert store.committed_steps(url) == [2]
    assert store.latest_committed(url) == 2
    store.verify(url, 2)
