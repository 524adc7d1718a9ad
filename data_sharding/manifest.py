"""The first and the last step of a sharding: is it done already, and now it is.

The manifest is written when everything else is in place, so its presence means "complete". It
carries a digest of the inputs and options it was made from: the same command on the same inputs
finds its work done, and another command cannot mix its shards into it.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from data_sharding.fan_out import Probed
from data_sharding.probe import Rejected
from data_sharding.sources import SourceVideo
from svfap_dist import shard_format, storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shard_format import FORMAT_VERSION, MANIFEST_NAME, REJECTED_NAME, Manifest

_SHARD_FILE = re.compile(r"(shard-\d{6,})\.(tar|index\.json)")


def inputs_digest(videos: Iterable[SourceVideo], options: Mapping[str, str | int]) -> str:
    """Digest of what decides the bytes of a data set: the videos' names, sizes, labels, options."""
    rows = hashlib.sha256(json.dumps([FORMAT_VERSION, sorted(options.items())]).encode())
    for video in videos:
        row = [video.key, video.suffix, video.stamp, video.labels]
        rows.update(b"\n" + json.dumps(row, sort_keys=True).encode())
    return rows.hexdigest()[:16]


def finished(url: str, digest: str) -> Manifest | None:
    """The manifest under `url` if it is whole and of these inputs; None if the work is to be done.

    An interrupted sharding has left shards and no manifest; they are made again. So are the shards
    of a data set of the same inputs from which some have been lost.

    Raises: ConfigError if something else is there; StorageError from the store.
    """
    if not storage.exists(storage.join(url, MANIFEST_NAME)):
        _refuse_foreign_shards(url)
        return None
    elsewhere = "use another URL, or replace it with --overwrite"
    try:
        manifest = shard_format.load_manifest(url)
    except ShardError as error:
        raise ConfigError(
            "Output holds a manifest that cannot be read", where=url, found=str(error), do=elsewhere
        ) from error
    if manifest.inputs_digest != digest:
        found = f"{manifest.num_samples} samples of source {manifest.source!r}, made from "
        found += f"inputs {manifest.inputs_digest}, while the inputs now are {digest}"
        raise ConfigError(
            "Output holds a data set of other inputs or options",
            where=url,
            found=found,
            do=elsewhere,
        )
    try:
        shard_format.check_shards(url, manifest)
    except ShardError:
        return None
    return manifest


def _refuse_foreign_shards(url: str) -> None:
    """Shards that another tool wrote, under the names that are about to be written, are precious.

    An interrupted sharding leaves an index beside each tar, but for the last.
    """
    found = [match for name in storage.list_files(url) if (match := _SHARD_FILE.fullmatch(name))]
    tars = {match[1] for match in found if match[2] == "tar"}
    indexed = {match[1] for match in found if match[2] != "tar"}
    if len(tars - indexed) > 1:
        raise ConfigError(
            "Output holds shards that this command did not write",
            where=url,
            found=f"{len(tars - indexed)} tars without index, such as {min(tars - indexed)}.tar",
            do="use another URL, or replace them with --overwrite",
        )


def begin(url: str) -> None:
    """Take the manifest away: from now on nothing under `url` counts as complete.

    Raises: StorageError if `url` cannot be written, while nothing has been worked in vain.
    """
    storage.delete(storage.join(url, MANIFEST_NAME))
    write_rejected(url, [])


def write_rejected(url: str, rejected: Iterable[Probed]) -> None:
    """Write the list of videos that were left out, one JSON object a line."""
    lines: list[str] = []
    for item in rejected:
        assert isinstance(item.result, Rejected)
        reason, detail = item.result.reason, item.result.detail
        row = {"key": item.video.key, "where": item.video.where, "reason": reason, "detail": detail}
        lines.append(json.dumps(row) + "\n")
    storage.write_bytes(storage.join(url, REJECTED_NAME), "".join(lines).encode())


def count_rejected(url: str) -> dict[str, int]:
    """How many videos were left out, by reason, most frequent first."""
    where = storage.join(url, REJECTED_NAME)
    lines = storage.read_bytes(where).splitlines() if storage.exists(where) else []
    return dict(collections.Counter(json.loads(line)["reason"] for line in lines).most_common())


def complete(url: str, manifest: Manifest) -> None:
    """Remove shards that an earlier sharding left and, last of all, write the manifest."""
    ours = {entry.name for entry in manifest.shards}
    ours |= {entry.index_name for entry in manifest.shards}
    for name in storage.list_files(url):
        if _SHARD_FILE.fullmatch(name) and name not in ours:
            storage.delete(storage.join(url, name))
    storage.write_bytes(storage.join(url, MANIFEST_NAME), shard_format.dump(manifest))
