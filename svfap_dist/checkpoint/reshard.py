"""A checkpoint brought ahead of time into the form that any number of ranks loads.

In: a committed checkpoint of ZeRO stage 1 to 3. Out: a committed checkpoint of the same step below
another run's URL, with DeepSpeed's universal form as one tar in place of every rank's shards.
`checkpoint.load` makes the same form of shards that were cut for other ranks, while all ranks wait;
here it is made once, beforehand, by the same code, so that resuming from either gives the same
bits.
"""

from __future__ import annotations

import dataclasses
import os
import tarfile
import tempfile

from svfap_dist import storage
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.store import STATE, UNIVERSAL, WEIGHTS, checkpoint_url
from svfap_dist.config import check_world_size, recipe
from svfap_dist.errors import CheckpointError, ConfigError
from svfap_dist.progress import say


@dataclasses.dataclass(frozen=True)
class Reshaped:
    """What was made. bytes: of its files; from_world_size: ranks that saved it."""

    url: str
    step: int
    bytes: int
    from_world_size: int
    run_url: str

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"{self.url}: committed and verified, {self.bytes} bytes, saved by "
            f"{self.from_world_size} ranks, to be loaded by any number.",
            f"Resume with run.url={self.run_url}",
        ]


def reshape(url: str, run_url: str, world_size: int | None = None) -> Reshaped:
    """Write the checkpoint `url` (or the newest of the run `url`) anew, below `run_url`.

    Args:
        world_size: ranks that are to go on with it; None: not known yet.

    Raises: ConfigError if so many ranks cannot go on with it, or there is nothing to reshape;
    CheckpointError if it is damaged, or there is one of that step already; StorageError.
    """
    source, step = _find(url)
    state = store.read_state(source, step)
    where = checkpoint_url(source, step)
    if world_size is not None:
        check_world_size(recipe.from_tables(state.config, where=where), world_size, "--world-size")
    if state.zero_stage == 0 or state.universal:
        found = "ZeRO stage 0" if state.zero_stage == 0 else "in the universal form"
        raise ConfigError(
            "Nothing to reshape",
            where=where,
            found=f"the checkpoint is {found}, which any number of ranks loads",
            do="resume from it as it is",
        )
    target = checkpoint_url(run_url, step)
    if storage.list_files(target):
        raise CheckpointError(
            "There is a checkpoint already",
            where=target,
            found=f"files of step {step}",
            do="name another folder with -o, or delete that one",
        )
    with tempfile.TemporaryDirectory(prefix="svfap-reshape-") as folder:
        say(f"Reading {where} ...")
        shards, part = os.path.join(folder, "shards"), os.path.join(folder, "part")
        store.fetch_shards(source, step, shards)
        store.fetch(source, step, part, names=(WEIGHTS,))
        say("Reshaping ...")
        universal = store.make_universal(shards)
        with tarfile.open(os.path.join(part, UNIVERSAL), "w") as tar:
            tar.add(universal, arcname=".")
        universal_state = dataclasses.replace(state, universal=True)
        storage.write_bytes(os.path.join(part, STATE), universal_state.to_json())
        say(f"Writing {target} ...")
        rows = store.upload(part, target)
    store.commit(target, rows)
    store.verify(run_url, step)
    size = sum(row["size"] for row in rows)
    return Reshaped(target, step, size, state.world_size, run_url)


def _find(url: str) -> tuple[str, int]:
    """Run and step of a checkpoint, or of the newest of a run."""
    weights, _ = load.locate(url)  # says so if there is none
    folder = weights.removesuffix(f"/{WEIGHTS}")
    parent, _, tag = folder.rpartition("/")
    run_url, _, checkpoints = parent.rpartition("/")
    if checkpoints != "checkpoints" or not tag.removeprefix("step-").isdigit():
        raise ConfigError(
            "Not the checkpoint of a run",
            where=url,
            found=f"it lies in {folder}",
            do="give the run.url of a run, or one of its checkpoints/step-... folders",
        )
    return run_url, int(tag.removeprefix("step-"))
