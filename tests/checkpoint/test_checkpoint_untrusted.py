"""Checkpoints that another may have written: no code is run, and nothing is written elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from hostile import HOSTILE_TARS, pax_member

from svfap_dist.checkpoint import store
from svfap_dist.checkpoint.untrusted import extract_files, pickle_by_value, refuse_code
from svfap_dist.errors import CheckpointError
from svfap_dist.model.convert import read_pth


class Opens:
    """A pickle of this opens a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "zero/w").mkdir(parents=True)
    planted = tmp_path / "planted"
    torch.save({"w": torch.ones(3), "x": Opens(planted)}, tmp_path / "zero/w/fp32.pt")
    with pytest.raises(CheckpointError, match=r"may run code.*fp32.*it loads .*open"):
        refuse_code(str(tmp_path))
    with pytest.raises(CheckpointError, match="Weights cannot be read"):
        read_pth(str(tmp_path / "zero/w/fp32.pt"))
    assert not planted.exists()
    (tmp_path / "zero/w/fp32.pt").write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="Checkpoint is damaged"):
        refuse_code(str(tmp_path))


def test_functions_of_deepspeed_are_no_data(tmp_path: Path) -> None:
    class Calls:
        def __reduce__(self):
            from deepspeed.utils.numa import get_numa_cores

            return get_numa_cores, ()

    torch.save(Calls(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"it loads deepspeed\.utils\.numa"):
        refuse_code(str(tmp_path))


def test_what_deepspeed_saves_is_accepted(tmp_path: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    pickle_by_value(ZeroStageEnum)
    saved = [LossScaler(1.0), ZeroStageEnum(2), fragment_address(3, 4), torch.ones(2)]
    torch.save(saved, tmp_path / "[1]_optim_states.pt")
    refuse_code(str(tmp_path))


@pytest.mark.parametrize("name", [*HOSTILE_TARS, "../x", "/x"])
def test_a_tar_is_unpacked_in_its_folder_or_not_at_all(name: str, tmp_path: Path) -> None:
    if name.endswith("/x"):
        outside = str(tmp_path / "x") if name == "/x" else name
        data = pax_member(outside, b"x")
    else:
        data = HOSTILE_TARS[name]
    (tmp_path / "universal.tar").write_bytes(data + bytes(1024))
    folder = tmp_path / "in/folder"
    try:
        extract_files(str(tmp_path / "universal.tar"), str(folder))
    except CheckpointError as error:
        assert "universal.tar" in error.where  # noqa: PT017
    else:
        assert name == "/x"  # which becomes a path in the folder
    outside = [path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "in")]
    assert outside == [tmp_path / "universal.tar"]
    for path in folder.rglob("*"):
        assert not path.is_symlink()
        assert path.is_dir() or path.stat().st_size <= 1


def test_a_tar_is_unpacked_where_tarfile_has_no_filters(tmp_path, monkeypatch) -> None:
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/fp32.pt").write_bytes(b"weights")
    with tarfile.open(tmp_path / "universal.tar", "w") as tar:
        tar.add(tmp_path / "zero", "./zero")
    monkeypatch.delattr(tarfile, "data_filter", raising=False)  # Python 3.11.2 has none
    extract_files(str(tmp_path / "universal.tar"), str(tmp_path / "in"))
    assert (tmp_path / "in/zero/fp32.pt").read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ""])
def test_a_file_of_a_checkpoint_has_a_plain_name(name: str, tmp_path: Path) -> None:
    url = tmp_path / "checkpoints/step-000000001"
    url.mkdir(parents=True)
    rows = json.dumps({"files": [{"name": name, "size": 1, "sha256": "0"}]}).encode()
    (url / "files.json").write_bytes(rows)
    (url / "COMMIT").write_text(hashlib.sha256(rows).hexdigest())
    with pytest.raises(CheckpointError, match="which is no file's"):
        store.verify(str(tmp_path), 1)
    assert os.listdir(tmp_path) == ["checkpoints"]
