"""Inspect an output before a sharding, and commit its manifest at the end.

The manifest is written when everything else is in place, so its presence means "complete". It
contains its options and a digest of its inputs: the same command on the same inputs has nothing to
do, one on more inputs adds shards for the new ones, and a command with other options is refused.
While shards are added, the old manifest stays, for runs that train on it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from data_sharding import markers, temporary
from data_sharding.markers import Marker, Tally
from data_sharding.plan import Group, Plan, options_digest
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME, REJECTED_NAME, Manifest, ShardEntry

_SHARD_FILE = re.compile(r"shard-(\d{6,})\.(tar|index\.json|done\.json)")
_OTHER_DATA = "Output already contains a data set made from other inputs or options"
_ELSEWHERE = "use another URL, or replace it with --overwrite"


class ExistingOutput:
    """Finished shards under a URL, which decide what is still to be made.

    Args:
        url: URL of the data set.
        options: Options of this sharding.
        manifest: Manifest of the complete data set there, with the same options, if any.
    """

    def __init__(self, url: str, options: Mapping[str, object], manifest: Manifest | None) -> None:
        self.url, self.manifest = url, manifest
        self._options_digest = options_digest(options)
        self._sizes = storage.list_files(url)

    @property
    def num_groups(self) -> int:
        """Number of groups of the existing data set."""
        return self.manifest.num_groups if self.manifest else 0

    def is_intact(self) -> bool:
        """Return whether all shards of the manifest exist, at their full size."""
        assert self.manifest is not None
        return all(self._has(entry) for entry in self.manifest.shards)

    def _has(self, entry: ShardEntry | None) -> bool:
        if entry is None:
            return True
        same_size = self._sizes.get(entry.name) == entry.num_bytes
        return same_size and entry.index_name in self._sizes

    def marker(self, group: Group) -> Marker | None:
        """Return the marker of a group whose shard is finished, or None.

        Args:
            group: Group of this sharding.
        """
        if markers.marker_name(group.number) not in self._sizes:
            return None
        try:
            marker = markers.load_marker(self.url, group.number)
        except ShardError:
            return None
        digest = markers.group_digest(group, self._options_digest)
        return marker if marker.group_digest == digest and self._has(marker.entry) else None

    def refuse_foreign_shards(self) -> None:
        """Raise ConfigError if another tool has written shards with our names here."""
        tars = [
            name for name in self._sizes if _SHARD_FILE.fullmatch(name) and name.endswith("tar")
        ]
        if tars and REJECTED_NAME not in self._sizes:  # which an interrupted sharding has left
            what = "Output holds shards that this command did not write"
            found = f"{len(tars)} tars, such as {tars[0]}, and no {REJECTED_NAME}"
            raise ConfigError(what, self.url, found, _ELSEWHERE)

    def groups(self, plan: Plan) -> Iterator[Group]:
        """Yield all groups of the data set: those of existing shards, then new ones.

        Args:
            plan: Plan in which `mark_existing` has marked the existing videos.
        """
        for number in range(self.num_groups):
            yield plan.group(number, markers.load_marker(self.url, number).keys)
        yield from plan.new_groups(self.num_groups)

    def mark_existing(self, plan: Plan) -> None:
        """Mark in the plan which videos are in shards already.

        Args:
            plan: Plan with all videos of the source.

        Raises:
            ConfigError: One of them is gone or has changed, or a marker is missing.
        """
        for number in range(self.num_groups):
            try:
                marker = markers.load_marker(self.url, number)
            except (ShardError, storage.StorageMissingError) as error:
                where = storage.join(self.url, markers.marker_name(number))
                what = "Marker of a finished shard is missing or unreadable"
                raise ConfigError(what, where, str(error), _ELSEWHERE) from error
            plan.keep(marker.keys, marker.digests)
        if found := plan.changes():
            raise ConfigError(_OTHER_DATA, self.url, found, _ELSEWHERE)


def inspect_output(url: str, options: Mapping[str, object]) -> ExistingOutput:
    """Return what exists under a URL.

    Args:
        url: URL of the data set.
        options: Options of this sharding.

    Raises:
        ConfigError: A data set of other options, or something else, is there.
    """
    if not storage.exists(storage.join(url, MANIFEST_NAME)):
        existing = ExistingOutput(url, options, None)
        existing.refuse_foreign_shards()
        return existing
    try:
        manifest = shard_format.load_manifest(url)
    except ShardError as error:
        what = "Output holds a manifest that cannot be read"
        raise ConfigError(what, url, str(error), _ELSEWHERE) from error
    if manifest.options != options:
        old = manifest.options
        names = [name for name in sorted({*old, *options}) if old.get(name) != options.get(name)]
        changes = "; ".join(f"{name} was {old.get(name)}, is {options.get(name)}" for name in names)
        found = f"{manifest.num_samples} samples of source {manifest.source!r}, {changes}"
        raise ConfigError(_OTHER_DATA, url, found, _ELSEWHERE)
    return ExistingOutput(url, options, manifest)


def begun_with(
    url: str, plan: Plan, candidates: Sequence[dict[str, object]]
) -> dict[str, object] | None:
    """Return the options of the data set under a URL, None if there is none.

    Args:
        url: URL of the data set.
        plan: Plan with all videos of the source.
        candidates: Options that an interrupted sharding, which has no manifest, may have had.
    """
    if storage.exists(storage.join(url, MANIFEST_NAME)):
        try:
            return shard_format.load_manifest(url).options
        except ShardError:
            return None
    numbers = {markers.shard_number(name) for name in storage.list_files(url)} - {None}
    for group in plan.new_groups(0) if numbers else ():
        if group.number not in numbers:
            continue
        with contextlib.suppress(ShardError, storage.StorageMissingError):
            made = markers.load_marker(url, group.number).group_digest
            for options in candidates:
                if made == markers.group_digest(group, options_digest(options)):
                    return options
    return None


def invalidate_manifest(url: str) -> None:
    """Delete the manifest: from now on nothing under the URL counts as complete.

    Args:
        url: URL of the data set.

    Raises:
        StorageError: The output cannot be written, which is noticed here, before any work.
    """
    storage.delete(storage.join(url, MANIFEST_NAME))
    storage.write_bytes(storage.join(url, REJECTED_NAME), b"")


def gather_markers(
    url: str, groups: Iterable[Group], options: Mapping[str, object]
) -> tuple[list[ShardEntry], Tally]:
    """Write the list of rejected videos, one JSON object a line, from the markers of all groups.

    Args:
        url: URL of the data set.
        groups: All of its groups.
        options: Options of this sharding.

    Returns:
        The existing shards, and the tally of all videos.

    Raises:
        ShardError: A marker is not of this data set.
    """
    entries: list[ShardEntry] = []
    tally, digest = Tally(), options_digest(options)
    with temporary.file() as (lines, path):
        for group in groups:
            marker = _marker_of(url, group, digest)
            tally.add(marker.tally)
            entries += [marker.entry] if marker.entry else []
            with temporary.as_storage_error():
                lines.writelines(json.dumps(row).encode() + b"\n" for row in marker.rejected)
                lines.flush()
        storage.upload_file(path, storage.join(url, REJECTED_NAME))
    return entries, tally


def _marker_of(url: str, group: Group, digest: str) -> Marker:
    """Return the marker of a finished group; raise if another job replaced or deleted it."""
    found = "it is gone"
    with contextlib.suppress(storage.StorageMissingError):
        marker = markers.load_marker(url, group.number)
        if marker.group_digest == markers.group_digest(group, digest):
            return marker
        found = "it was made from other videos or with other options"
    what = "Another job has written to this output meanwhile"
    fix = "wait until it ends and run the same command again, or use another URL"
    raise ShardError(what, storage.join(url, markers.marker_name(group.number)), found, fix)


def commit_manifest(url: str, manifest: Manifest) -> None:
    """Delete files of an earlier sharding and, last of all, write the manifest.

    Args:
        url: URL of the data set.
        manifest: Manifest of all its shards.
    """
    named = {name for entry in manifest.shards for name in (entry.name, entry.index_name)}
    named |= {markers.marker_name(number) for number in range(manifest.num_groups)}
    for name in storage.list_files(url):
        if _SHARD_FILE.fullmatch(name) and name not in named:
            storage.delete(storage.join(url, name))
    storage.write_bytes(storage.join(url, MANIFEST_NAME), shard_format.dump(manifest))


def options_as_json(**options: object) -> dict[str, object]:
    """Return options as they are read back from a manifest: JSON values, nested by kind.

    Args:
        options: Plain values and dataclasses; None is left out.
    """
    plain = {
        name: dataclasses.asdict(value)  # type: ignore[call-overload]
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in options.items()
        if value is not None
    }
    return json.loads(json.dumps(plain))
