"""Layout of checkpoints in the store, their train state, and what counts as committed.

In: the URL of a run. Out: steps, states and verified files.

`checkpoints/step-000001000/` below the run holds DeepSpeed's shards of every rank, the full weights
(model.safetensors), state.json, one marker per rank under ranks/, files.json (name, size, SHA-256
of everything but the markers) and the commit marker COMMIT (the SHA-256 of files.json), which is
written last. A reader takes the newest checkpoint that has COMMIT and whose sizes match files.json.
So a rank killed at any instant leaves a complete checkpoint or one that every reader ignores.

The order of samples is a pure function of (manifest, seed, step), so the few numbers of
`TrainState` are the whole state of the data side.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from svfap_dist import storage
from svfap_dist.checkpoint import local_copies
from svfap_dist.config import Config, recipe
from svfap_dist.config.changes import CHANGEABLE
from svfap_dist.errors import CheckpointError, ConfigError

COMMIT, FILES, STATE, WEIGHTS = "COMMIT", "files.json", "state.json", "model.safetensors"
UNIVERSAL = "universal.tar"  # DeepSpeed's universal form, in place of the shards of all ranks

_PARALLEL = 16  # files that are read at a time
_OF_RANK = re.compile(r"zero_pp_rank_(\d+)_")  # in the names of DeepSpeed's files

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TrainState:
    """A run after `step` optimizer steps: state.json.

    epoch: the epoch of the next step, from 0. clips_seen: over all ranks. world_size, zero_stage:
    of the ranks that saved, which decide how their shards can be loaded. config: the resolved
    recipe as nested tables. universal: the shards are in DeepSpeed's universal form (see
    `reshard`).
    """

    step: int
    epoch: int
    clips_seen: int
    manifest_fingerprint: str
    config_fingerprint: str
    seed: int
    world_size: int
    zero_stage: int
    config: dict[str, Any]
    versions: dict[str, str]
    universal: bool = False

    @classmethod
    def of_run(
        cls, config: Config, step: int, steps_per_epoch: int, fingerprint: str, world_size: int
    ) -> TrainState:
        """Return the state of a run.

        Args:
            config: The run's recipe.
            step: Completed optimizer steps.
            steps_per_epoch: Optimizer steps of an epoch.
            fingerprint: Fingerprint of the manifest trained on.
            world_size: Number of ranks that save.
        """
        return cls(
            step=step,
            epoch=step // steps_per_epoch,
            clips_seen=step * config.train.global_batch_size,
            manifest_fingerprint=fingerprint,
            config_fingerprint=config.fingerprint,
            seed=config.run.seed,
            world_size=world_size,
            zero_stage=config.train.zero_stage,
            config=config.model_dump(mode="json"),
            versions=package_versions(),
        )

    @property
    def provenance(self) -> dict[str, Any]:
        """Return the part of a network's description that says how it was trained."""
        return {
            "step": self.step,
            "clips_seen": self.clips_seen,
            "data_fingerprint": self.manifest_fingerprint,
            "recipe_fingerprint": self.config_fingerprint,
            "versions": self.versions,
        }

    def to_json(self) -> bytes:
        """Return the JSON bytes of state.json."""
        return (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> TrainState:
        """Parse what `to_json` wrote.

        Args:
            data: JSON bytes.
            where: URL they were read from, for the error.

        Raises:
            CheckpointError: If the bytes are no train state.
        """
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError) as error:
            do = "delete that checkpoint's COMMIT file to fall back to the one before it"
            raise CheckpointError("Unreadable train state", where, repr(error), do) from error

    def with_order(self, config: Config) -> Config:
        """Return a recipe with the order of samples that the run began with.

        Args:
            config: The recipe to continue with.
        """
        version = recipe.from_stored(self.config, where="state.json").data.order_version
        data = config.data.model_copy(update={"order_version": version})
        return config.model_copy(update={"data": data})

    def check_resumable(self, config: Config, fingerprint: str, where: str) -> None:
        """Check that a recipe and its data continue the run of this state.

        Keys that run.allow_change names may have other values.

        Args:
            config: The recipe to continue with; the run keeps its own order of samples.
            fingerprint: Fingerprint of its data's manifest.
            where: URL of the checkpoint, for the error.

        Raises:
            ConfigError: Naming the data or the keys that differ.
        """
        if self.manifest_fingerprint != fingerprint:
            title, trained = "The run was started on other data", self.manifest_fingerprint
            found = f"manifest {fingerprint}, but {where} was trained on {trained}"
            advice = "set data.url to what the run was started with, or run.url to start a new run"
            raise ConfigError(title, f"data.url = {', '.join(config.data.urls)}", found, advice)
        config = self.with_order(config)
        found = self.changes(config)
        allowed = [change for change in found if change.key in config.run.allow_change]
        if _undone(config, allowed).fingerprint == self.config_fingerprint:
            return
        refused = [change for change in found if change not in allowed]
        differences = [
            f"{change.name} is {change.now!r}, was {change.before!r}" for change in refused
        ]
        advice = "set these keys back to resume the run, or give another run.url for a new one"
        if refused and all(change.key in CHANGEABLE for change in refused):
            keys = ",".join(change.key for change in refused)
            advice += (
                f"; run.allow_change={keys} continues the run with the new values from here on"
            )
        title = "The run was started with another recipe"
        text = "; ".join(differences) or "another version of the recipe"
        raise ConfigError(title, where, text, advice)

    def changes(self, config: Config) -> list[Change]:
        """Return the keys that count in the fingerprint and have other values in a recipe.

        Args:
            config: The recipe to continue with.
        """
        saved = recipe.from_stored(self.config, where="state.json")
        found = []
        for section, values in config:
            earlier = getattr(saved, section)
            if values is None or earlier is None:  # [task] is optional
                if values != earlier:
                    found.append(Change(section, earlier, values))
                continue
            for name, value in values:
                change = Change(f"{section}.{name}", getattr(earlier, name), value)
                if change.before != value:
                    undone = _undone(config, [change])
                    found += [change] if undone.fingerprint != config.fingerprint else []
        return found


@dataclasses.dataclass(frozen=True)
class Change:
    """A key of the recipe, or an optional section, with another value than the run had."""

    key: str
    before: Any
    now: Any

    @property
    def name(self) -> str:
        """Return the key, or the section in brackets."""
        return self.key if "." in self.key else f"[{self.key}]"


def _undone(config: Config, changes: Iterable[Change]) -> Config:
    """Return a recipe with changed keys set back."""
    for change in changes:
        section, _, name = change.key.partition(".")
        restored = getattr(config, section).model_copy(update={name: change.before})
        config = config.model_copy(update={section: restored})
    return config


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    names = ("svfap-dist", "torch", "deepspeed", "numpy", "av")
    return {name: importlib.metadata.version(name) for name in names}


def checkpoint_url(run_url: str, step: int) -> str:
    """Return the URL of a checkpoint's folder.

    Args:
        run_url: URL of the run.
        step: Completed optimizer steps.
    """
    return storage.join(run_url, "checkpoints", checkpoint_tag(step))


def checkpoint_tag(step: int) -> str:
    """Return the name of a checkpoint's folder, which is DeepSpeed's tag for it.

    Args:
        step: Completed optimizer steps.
    """
    return f"step-{step:09d}"


def list_checkpoints(run_url: str) -> dict[int, dict[str, int]]:
    """Return the bytes of each file of each checkpoint, committed or not, by step and name.

    Args:
        run_url: URL of the run.
    """
    steps: dict[int, dict[str, int]] = {}
    for path, size in storage.list_files(storage.join(run_url, "checkpoints")).items():
        folder, _, name = path.partition("/")
        number = folder.removeprefix("step-")
        if name and number.isdigit():
            steps.setdefault(int(number), {})[name] = size
    return steps


def split_committed(listing: Mapping[int, Collection[str]]) -> tuple[list[int], list[int]]:
    """Return the steps that have a commit marker and those that have none, oldest first.

    Args:
        listing: File names by step, as `list_checkpoints` returns them.
    """
    committed = [step for step in sorted(listing) if COMMIT in listing[step]]
    return committed, sorted(listing.keys() - set(committed))


def steps_to_delete(steps: Iterable[int], keep_last: int, keep_every: int) -> list[int]:
    """Return the steps whose checkpoints the retention policy deletes, oldest first.

    Args:
        steps: Committed steps.
        keep_last: Number of newest checkpoints to keep.
        keep_every: Keep multiples of this step, too; 0: none.
    """
    ordered = sorted(steps)
    kept = set(ordered[-keep_last:])
    return [s for s in ordered if s not in kept and not (keep_every and s % keep_every == 0)]


def committed_steps(run_url: str) -> list[int]:
    """Return the steps of all committed checkpoints, oldest first.

    Args:
        run_url: URL of the run.
    """
    return split_committed(list_checkpoints(run_url))[0]


def latest_committed(run_url: str) -> int | None:
    """Return the newest step whose files have the committed sizes; damaged ones are skipped.

    Args:
        run_url: URL of the run.
    """
    listing = list_checkpoints(run_url)
    for step in reversed(split_committed(listing)[0]):
        url, sizes = checkpoint_url(run_url, step), listing[step]
        try:
            expected = {row["name"]: row["size"] for row in _file_rows(url)}
        except CheckpointError as error:
            log.warning("Skipped a damaged checkpoint: %s", error)
            continue
        wrong = sorted(name for name, size in expected.items() if sizes.get(name) != size)
        if not wrong:
            return step
        log.warning(
            "Skipped the damaged checkpoint %s: %s is missing or of another size", url, wrong[0]
        )
    return None


def read_state(run_url: str, step: int) -> TrainState:
    """Return the train state of a committed checkpoint.

    Args:
        run_url: URL of the run.
        step: Its completed optimizer steps.
    """
    where = storage.join(checkpoint_url(run_url, step), STATE)
    return TrainState.from_json(storage.read_bytes(where), where)


def verify(run_url: str, step: int) -> None:
    """Read every file of a checkpoint and compare its digest.

    Args:
        run_url: URL of the run.
        step: Its completed optimizer steps.

    Raises:
        CheckpointError: Naming the first file that is missing or not what was written.
    """
    url = checkpoint_url(run_url, step)
    if not storage.exists(storage.join(url, COMMIT)):
        do = f"choose one of {committed_steps(run_url)}"
        raise CheckpointError("Checkpoint is not committed", url, "no COMMIT file", do)
    with tempfile.TemporaryDirectory() as folder:
        for row in _file_rows(url):
            _download(url, row, folder)
            os.unlink(os.path.join(folder, row["name"]))


def _file_rows(url: str) -> list[dict[str, Any]]:
    """Return the rows of files.json, checked against COMMIT."""
    try:
        data = storage.read_bytes(storage.join(url, FILES))
    except storage.StorageMissingError as error:
        raise _damaged(url, FILES, "it is missing") from error
    committed = storage.read_bytes(storage.join(url, COMMIT)).decode(errors="replace")
    if hashlib.sha256(data).hexdigest() != committed:
        raise _damaged(url, FILES, "its digest differs from COMMIT")
    rows = json.loads(data)["files"]
    for row in rows:
        if os.path.basename(row["name"]) != row["name"] or row["name"] in ("", ".", ".."):
            raise _damaged(url, FILES, f"the name {row['name']!r}, which is no file's")
    return rows


def _download(url: str, row: dict[str, Any], folder: str) -> None:
    """Copy one file of a checkpoint into a local folder and check its digest."""
    local = os.path.join(folder, row["name"])
    try:
        storage.download_file(storage.join(url, row["name"]), local)
    except storage.StorageMissingError as error:
        raise _damaged(url, row["name"], "it is missing") from error
    if _file_sha256(local) != row["sha256"]:
        raise _damaged(url, row["name"], "its digest differs from files.json")


def _damaged(url: str, name: str, found: str) -> CheckpointError:
    advice = f"delete {storage.join(url, COMMIT)}: the run then resumes from the one before it"
    return CheckpointError("Checkpoint is damaged", storage.join(url, name), found, advice)


def _file_sha256(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(
    run_url: str,
    step: int,
    folder: str,
    names: Collection[str] | None = None,
    ranks: Collection[int] | None = None,
) -> None:
    """Download files of a checkpoint, several at a time, and check their digests.

    Args:
        run_url: URL of the run.
        step: Completed optimizer steps of the checkpoint.
        folder: Local folder to write to.
        names: Names of the files; None: those that DeepSpeed saved.
        ranks: Of the files that belong to one rank, only these ranks' are needed; None: all.

    Raises:
        CheckpointError: Naming a file that is missing or damaged.
    """
    url = checkpoint_url(run_url, step)
    wanted = [row for row in _file_rows(url) if _is_wanted(row["name"], names, ranks)]
    copies = [os.path.join(copy, checkpoint_tag(step)) for copy in local_copies.find(run_url)]
    os.makedirs(folder, exist_ok=True)

    def get(row: dict[str, Any]) -> None:
        if not any(_copy(row, copy, folder) for copy in copies):
            _download(url, row, folder)

    with ThreadPoolExecutor(_PARALLEL, thread_name_prefix="checkpoint-download") as pool:
        list(pool.map(get, wanted))


def _copy(row: dict[str, Any], source: str, folder: str) -> bool:
    """Link a file from a local copy of the checkpoint if it is the one that was committed."""
    path = os.path.join(source, row["name"])
    try:
        if os.path.getsize(path) != row["size"] or _file_sha256(path) != row["sha256"]:
            return False
        os.link(path, os.path.join(folder, row["name"]))
    except OSError:  # there is none, or it is on another file system
        return False
    return True


def _is_wanted(name: str, names: Collection[str] | None, ranks: Collection[int] | None) -> bool:
    if names is not None:
        return name in names
    of_rank = _OF_RANK.search(name)
    is_elsewhere = ranks is not None and of_rank is not None and int(of_rank[1]) not in ranks
    return name not in (WEIGHTS, STATE) and not is_elsewhere


def commit(url: str, rows: list[dict[str, Any]]) -> None:
    """Write files.json, then COMMIT; every file must be stored already.

    Args:
        url: URL of the checkpoint's folder.
        rows: Name, size and SHA-256 of its files, from `upload`.
    """
    files = json.dumps({"files": rows}, indent=1).encode()
    storage.write_bytes(storage.join(url, FILES), files)
    storage.write_bytes(storage.join(url, COMMIT), hashlib.sha256(files).hexdigest().encode())


def upload(folder: str, url: str) -> list[dict[str, Any]]:
    """Store all files of a local folder and return their rows for `commit`.

    Args:
        folder: Local folder.
        url: URL of the checkpoint's folder.
    """
    rows = []
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        storage.upload_file(path, storage.join(url, name))
        rows.append({"name": name, "size": os.path.getsize(path), "sha256": _file_sha256(path)})
    return rows


def delete(url: str) -> None:
    """Remove a checkpoint, its commit marker first, so that no reader uses a partial one.

    Args:
        url: URL of the checkpoint's folder.
    """
    storage.delete(storage.join(url, COMMIT))
    storage.delete(url)
