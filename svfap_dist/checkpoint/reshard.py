"""Convert a checkpoint into DeepSpeed's universal form, which does not depend on ranks or stage.

In: a committed checkpoint of ZeRO stage 1 to 3. Out: a committed checkpoint of the same step below
another run's URL, with the universal form as one tar in place of every rank's shards. Resuming does
not need it: `load.restore_engine` reads any shards. It makes one file of thousands of ranks' files,
and DeepSpeed's own tools read it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import logging
import os
import tarfile
import tempfile

from svfap_dist import storage
from svfap_dist.checkpoint import load, store
from svfap_dist.checkpoint.store import STATE, UNIVERSAL, WEIGHTS, checkpoint_url
from svfap_dist.checkpoint.untrusted import pickle_by_value, refuse_code
from svfap_dist.config import check_world_size, recipe
from svfap_dist.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ReshardResult:
    """The new checkpoint. bytes: of its files; from_world_size: ranks that saved the original."""

    url: str
    step: int
    bytes: int
    from_world_size: int
    run_url: str

    def lines(self) -> list[str]:
        """Return the text for a terminal."""
        return [
            f"{self.url}: committed and verified, {self.bytes} bytes, saved by "
            f"{self.from_world_size} ranks, loads on any number of ranks.",
            f"Resume with run.url={self.run_url}",
        ]


def reshard_checkpoint(url: str, run_url: str, world_size: int | None = None) -> ReshardResult:
    """Write a checkpoint in the universal form below another run's URL.

    Args:
        url: URL of a checkpoint, or of a run for its newest one.
        run_url: URL of the run to write to.
        world_size: Number of ranks to check the recipe for; None: unchecked.

    Raises:
        ConfigError: If that many ranks cannot continue, or the checkpoint needs no resharding.
        CheckpointError: If it is damaged, or `run_url` has a checkpoint of that step.
    """
    source, step = _run_and_step(url)
    state = store.read_state(source, step)
    where, target = checkpoint_url(source, step), checkpoint_url(run_url, step)
    if world_size is not None:
        check_world_size(recipe.from_stored(state.config, where=where), world_size, "--world-size")
    if state.zero_stage == 0 or state.universal:
        found = "ZeRO stage 0: one file" if state.zero_stage == 0 else "the universal form already"
        raise ConfigError("Checkpoint needs no resharding", where, found, "resume from it as it is")
    if storage.list_files(target):
        advice = "name another folder with -o, or delete that one"
        raise CheckpointError("Checkpoint exists already", target, f"files of step {step}", advice)
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # keeps DeepSpeed from searching for a GPU
    with tempfile.TemporaryDirectory(prefix="svfap-reshard-") as folder:
        log.info("Reading %s ...", where)
        shards, part = os.path.join(folder, "shards"), os.path.join(folder, "part")
        store.fetch(source, step, shards)
        refuse_code(shards)
        store.fetch(source, step, part, names=(WEIGHTS,))
        log.info("Resharding ...")
        universal = _convert_to_universal(shards)
        with tarfile.open(os.path.join(part, UNIVERSAL), "w") as tar:
            tar.add(universal, arcname=".")
        universal_state = dataclasses.replace(state, universal=True)
        storage.write_bytes(os.path.join(part, STATE), universal_state.to_json())
        log.info("Writing %s ...", target)
        rows = store.upload(part, target)
    store.commit(target, rows)
    store.verify(run_url, step)
    return ReshardResult(target, step, sum(r["size"] for r in rows), state.world_size, run_url)


def _convert_to_universal(folder: str) -> str:
    """Write the universal form beside a local folder of all ranks' shards; return its folder."""
    options = argparse.Namespace(
        input_folder=folder,
        output_folder=f"{folder}-universal",
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            from deepspeed.checkpoint import ds_to_universal
            from deepspeed.runtime.zero.config import ZeroStageEnum

            pickle_by_value(ZeroStageEnum)
            ds_to_universal.main(options)
    except Exception as error:  # of any kind: the files are not what it expects
        title, advice = "DeepSpeed cannot convert the checkpoint", "resume from it as it is"
        raise CheckpointError(title, folder, repr(error), advice) from error
    return options.output_folder


def _run_and_step(url: str) -> tuple[str, int]:
    """Return run and step of a checkpoint, or of the newest of a run."""
    weights_url, _ = load.locate_weights(url, newest=True)
    folder = weights_url.removesuffix(f"/{WEIGHTS}")
    parent, _, tag = folder.rpartition("/")
    run_url, _, checkpoints = parent.rpartition("/")
    if checkpoints != "checkpoints" or not tag.removeprefix("step-").isdigit():
        advice = "give the run.url of a run, or one of its checkpoints/step-... folders"
        raise ConfigError("Not the checkpoint of a run", url, f"its files are in {folder}", advice)
    return run_url, int(tag.removeprefix("step-"))
