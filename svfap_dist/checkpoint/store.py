"""Checkpoints as they lie in the store: found, verified, loaded and deleted here.

`checkpoints/step-000001000/` below the run holds DeepSpeed's shards of every rank, the full weights
(model.safetensors), state.json, a marker per rank under ranks/, files.json (name, size, SHA-256 of
everything above but the markers) and, last of all, COMMIT (the SHA-256 of files.json). They are
written by `checkpointer`.

Whoever looks for a checkpoint takes the newest with COMMIT whose sizes are as files.json says. A
rank killed at any instant leaves one that has COMMIT and is whole, or one that nobody looks at.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import tarfile
import tempfile
from collections.abc import Collection
from typing import Any

from svfap_dist import distributed, storage
from svfap_dist.checkpoint.state import CheckpointEngine, TrainState
from svfap_dist.config import Config
from svfap_dist.distributed import World
from svfap_dist.errors import CheckpointError

COMMIT, FILES, STATE, WEIGHTS = "COMMIT", "files.json", "state.json", "model.safetensors"
UNIVERSAL = "universal.tar"  # DeepSpeed's universal form, instead of every rank's shards

log = logging.getLogger(__name__)


def checkpoint_url(run_url: str, step: int) -> str:
    """Where the checkpoint of a step lies."""
    return storage.join(run_url, "checkpoints", tag_of(step))


def tag_of(step: int) -> str:
    """Name of a checkpoint's folder, and DeepSpeed's tag for it."""
    return f"step-{step:09d}"


def committed_steps(run_url: str) -> list[int]:
    """Steps of all checkpoints that have a COMMIT, oldest first."""
    return [step for step, files in sorted(listing(run_url).items()) if COMMIT in files]


def latest_committed(run_url: str) -> int | None:
    """Step of the newest checkpoint that is whole by its sizes; damaged ones are passed over."""
    for step, sizes in sorted(listing(run_url).items(), reverse=True):
        if COMMIT not in sizes:
            continue
        try:
            expected = {row["name"]: row["size"] for row in _files(run_url, step)}
        except CheckpointError as error:
            log.warning("Passed over a damaged checkpoint: %s", error)
            continue
        wrong = sorted(name for name, size in expected.items() if sizes.get(name) != size)
        if not wrong:
            return step
        log.warning(
            "Passed over the damaged checkpoint %s: %s is missing or of another size",
            checkpoint_url(run_url, step),
            wrong[0],
        )
    return None


def read_state(run_url: str, step: int) -> TrainState:
    """The train state of a committed checkpoint."""
    where = storage.join(checkpoint_url(run_url, step), STATE)
    return TrainState.from_json(storage.read_bytes(where), where)


def verify(run_url: str, step: int) -> None:
    """Read every file of a checkpoint again.

    Raises: CheckpointError naming the first that is missing or not what was written.
    """
    url = checkpoint_url(run_url, step)
    if not storage.exists(storage.join(url, COMMIT)):
        raise CheckpointError(
            "Checkpoint is not committed",
            where=url,
            found="no COMMIT file",
            do=f"choose one of {committed_steps(run_url)}",
        )
    with tempfile.TemporaryDirectory() as folder:
        for row in _files(run_url, step):
            _fetch(url, row, folder)
            os.unlink(os.path.join(folder, row["name"]))


def listing(run_url: str) -> dict[int, dict[str, int]]:
    """Sizes of the files of every checkpoint folder, committed or not, by step and name."""
    steps: dict[int, dict[str, int]] = {}
    for path, size in storage.list_files(storage.join(run_url, "checkpoints")).items():
        folder, _, name = path.partition("/")
        number = folder.removeprefix("step-")
        if name and number.isdigit():
            steps.setdefault(int(number), {})[name] = size
    return steps


def _files(run_url: str, step: int) -> list[dict[str, Any]]:
    """The rows of files.json, checked against COMMIT."""
    url = checkpoint_url(run_url, step)
    try:
        data = storage.read_bytes(storage.join(url, FILES))
    except storage.StorageMissing as error:
        raise _damaged(url, FILES, "it is missing") from error
    if sha256(data) != storage.read_bytes(storage.join(url, COMMIT)).decode(errors="replace"):
        raise _damaged(url, FILES, "another digest than COMMIT says")
    return json.loads(data)["files"]


def _fetch(url: str, row: dict[str, Any], folder: str) -> None:
    """Copy one file of a checkpoint into a local folder and check its digest."""
    local = os.path.join(folder, row["name"])
    try:
        storage.download_file(storage.join(url, row["name"]), local)
    except storage.StorageMissing as error:
        raise _damaged(url, row["name"], "it is missing") from error
    if file_sha256(local) != row["sha256"]:
        raise _damaged(url, row["name"], "another digest than files.json says")


def _damaged(url: str, name: str, found: str) -> CheckpointError:
    return CheckpointError(
        "Checkpoint is damaged",
        where=storage.join(url, name),
        found=found,
        do=f"delete {storage.join(url, COMMIT)}: the run then resumes from the one before it",
    )


def sha256(data: bytes) -> str:
    """SHA-256 in hex."""
    return hashlib.sha256(data).hexdigest()


def file_sha256(path: str) -> str:
    """SHA-256 of a local file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def needs_reshaping(state: TrainState, config: Config, world: World) -> bool:
    """Whether the checkpoint's shards must be cut anew: other ranks or another ZeRO stage."""
    same = (state.world_size, state.zero_stage) == (world.world_size, config.train.zero_stage)
    return state.universal or (state.zero_stage > 0 and not same)


def load(run_url: str, state: TrainState, engine: CheckpointEngine, reshape: bool) -> None:
    """Put weights and optimizer back; all ranks call it together. Each node downloads once.

    Args:
        reshape: as `needs_reshaping` says; the engine must have been made with `universal` so.

    Raises: CheckpointError, StorageError: on every rank, if it failed on any.
    """
    tag = tag_of(state.step)
    with tempfile.TemporaryDirectory(prefix=f"svfap-{tag}-") as folder:
        nodes = distributed.all_gather_object((socket.gethostname(), folder))
        shared = next(path for host, path in nodes if host == socket.gethostname())
        if shared == folder:
            distributed.run_on_all_ranks(lambda: _fetch_for_engine(run_url, state, folder, reshape))
        else:
            distributed.run_on_all_ranks(lambda: None)
        engine.load(shared, f"{tag}-universal" if reshape else tag)
        distributed.barrier()  # the node's folder goes when its last reader is done


def _fetch_for_engine(run_url: str, state: TrainState, folder: str, reshape: bool) -> None:
    if state.universal:
        fetch(run_url, state.step, folder, names=(UNIVERSAL,))
        packed = os.path.join(folder, UNIVERSAL)
        with tarfile.open(packed) as tar:
            tar.extractall(os.path.join(folder, f"{tag_of(state.step)}-universal"), filter="data")
        os.unlink(packed)
        return
    fetch_shards(run_url, state.step, os.path.join(folder, tag_of(state.step)))
    if reshape:
        make_universal(os.path.join(folder, tag_of(state.step)))


def fetch_shards(run_url: str, step: int, folder: str) -> None:
    """Copy what DeepSpeed saved of a checkpoint into a local folder.

    Raises: CheckpointError naming a file that is missing or damaged; StorageError.
    """
    names = [row["name"] for row in _files(run_url, step) if row["name"] not in (WEIGHTS, STATE)]
    fetch(run_url, step, folder, names)


def fetch(run_url: str, step: int, folder: str, names: Collection[str]) -> None:
    """Copy some files of a checkpoint into a local folder; raises as `fetch_shards`."""
    for row in _files(run_url, step):
        if row["name"] in names:
            _fetch(checkpoint_url(run_url, step), row, folder)


def make_universal(folder: str) -> str:
    """Write DeepSpeed's universal form of the checkpoint `folder` beside it; its folder.

    Raises: CheckpointError if that does not work.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # nothing is computed; or it looks for one
    options = argparse.Namespace(
        input_folder=folder,
        output_folder=f"{folder}-universal",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    chatter = io.StringIO()
    try:
        with contextlib.redirect_stdout(chatter), contextlib.redirect_stderr(chatter):
            from deepspeed.checkpoint import ds_to_universal

            ds_to_universal.main(options)
    except Exception as error:  # whatever it is, all ranks must hear of it
        raise CheckpointError(
            "Checkpoint cannot be reshaped for this number of ranks or ZeRO stage",
            where=folder,
            found=repr(error),
            do="resume with the number of ranks and the ZeRO stage it was saved with",
        ) from error
    return options.output_folder


def commit(url: str, rows: list[dict[str, Any]]) -> None:
    """Vouch for the files of a checkpoint, all of which are stored: files.json, then COMMIT."""
    files = json.dumps({"files": rows}, indent=1).encode()
    storage.write_bytes(storage.join(url, FILES), files)
    storage.write_bytes(storage.join(url, COMMIT), sha256(files).encode())


def upload(folder: str, url: str) -> list[dict[str, Any]]:
    """Store all files of a local folder; their rows for `commit`."""
    rows = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        storage.upload_file(path, storage.join(url, name))
        rows.append({"name": name, "size": os.path.getsize(path), "sha256": file_sha256(path)})
    return rows


def delete(url: str) -> None:
    """Remove a checkpoint: COMMIT first, so that half of it is never believed."""
    storage.delete(storage.join(url, COMMIT))
    storage.delete(url)
