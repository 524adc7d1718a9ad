"""The first and the last step of a sharding: what is there already, and now it is complete.

The manifest is written when everything else is in place, so its presence means "complete". It
carries its options and a digest of its inputs: the same command on the same inputs finds its work
done, one on more inputs adds shards for the new ones, and another command cannot mix its shards
into it. While shards are added, the manifest of before stays, for those who train on them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping

from data_sharding import markers, temporary
from data_sharding.markers import Marker, Tally
from data_sharding.plan import Group, Plan, options_digest
from svfap_dist import storage
from svfap_dist.errors import ConfigError, ShardError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import MANIFEST_NAME, REJECTED_NAME, Manifest, ShardEntry

_SHARD_FILE = re.compile(r"shard-(\d{6,})\.(tar|index\.json|done\.json)")
_ELSEWHERE = "use another URL, or replace it with --overwrite"


class Stock:
    """What lies under a URL, and so what is still to be made.

    manifest: the complete data set that is there, with the same options; None if there is none.
    """

    def __init__(self, url: str, options: Mapping[str, object], manifest: Manifest | None) -> None:
        self.url, self.manifest = url, manifest
        self._options_digest = options_digest(options)
        self._sizes = storage.list_files(url)

    @property
    def num_old(self) -> int:
        """Groups of the data set that is there; new ones are numbered from here on."""
        return self.manifest.num_groups if self.manifest else 0

    def is_whole(self) -> bool:
        """Whether all shards of the manifest are there, by their sizes."""
        assert self.manifest is not None
        return all(self._has(entry) for entry in self.manifest.shards)

    def _has(self, entry: ShardEntry | None) -> bool:
        if entry is None:
            return True
        same_size = self._sizes.get(entry.name) == entry.num_bytes
        return same_size and entry.index_name in self._sizes

    def marker(self, group: Group) -> Marker | None:
        """The marker of a group whose shard is finished and there; None if it is to be made."""
        if markers.name(group.number) not in self._sizes:
            return None
        try:
            marker = markers.load(self.url, group.number)
        except ShardError:
            return None
        digest = markers.group_digest(group, self._options_digest)
        return marker if marker.group_digest == digest and self._has(marker.entry) else None

    def groups(self, plan: Plan) -> Iterator[Group]:
        """All groups of the data set: those of the shards that are there, then new ones.

        `keep_old` has told the plan which videos are old.
        """
        for number in range(self.num_old):
            yield plan.group(number, markers.load(self.url, number).keys)
        yield from plan.new_groups(self.num_old)

    def keep_old(self, plan: Plan) -> None:
        """Tell the plan which videos are in shards already.

        Raises: ConfigError if one of them is gone or another now, or nobody knows them any more.
        """
        for number in range(self.num_old):
            try:
                marker = markers.load(self.url, number)
            except (ShardError, storage.StorageMissingError) as error:
                raise ConfigError(
                    "Output lacks what tells old videos from new ones",
                    where=storage.join(self.url, markers.name(number)),
                    found=str(error),
                    do=_ELSEWHERE,
                ) from error
            plan.keep(marker.keys, marker.digests)
        if misfits := plan.misfits():
            raise ConfigError(
                "Output holds a data set of other inputs or options",
                where=self.url,
                found=f"{misfits.vanished} of its videos are gone from the source and "
                f"{misfits.changed} have changed, such as {misfits.example!r}",
                do=_ELSEWHERE,
            )


def take_stock(url: str, options: Mapping[str, object]) -> Stock:
    """What lies under `url`.

    Raises: ConfigError if something else is there; StorageError from the store.
    """
    if not storage.exists(storage.join(url, MANIFEST_NAME)):
        stock = Stock(url, options, None)
        _refuse_foreign_shards(url)
        return stock
    try:
        manifest = shard_format.load_manifest(url)
    except ShardError as error:
        raise ConfigError(
            "Output holds a manifest that cannot be read",
            where=url,
            found=str(error),
            do=_ELSEWHERE,
        ) from error
    if manifest.options != options:
        found = f"{manifest.num_samples} samples of source {manifest.source!r}"
        raise ConfigError(
            "Output holds a data set of other inputs or options",
            where=url,
            found=f"{found}, {_differences(manifest.options, options)}",
            do=_ELSEWHERE,
        )
    return Stock(url, options, manifest)


def _differences(old: Mapping[str, object], new: Mapping[str, object]) -> str:
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {old.get(name)}, is {new.get(name)}" for name in names)


def _refuse_foreign_shards(url: str) -> None:
    """Shards that another tool wrote, under the names that are about to be written, are precious.
    A sharding that was interrupted has left the list of rejected videos beside its own."""
    names = storage.list_files(url)
    tars = [name for name in names if _SHARD_FILE.fullmatch(name) and name.endswith(".tar")]
    if tars and REJECTED_NAME not in names:
        raise ConfigError(
            "Output holds shards that this command did not write",
            where=url,
            found=f"{len(tars)} tars, such as {tars[0]}, and no {REJECTED_NAME}",
            do="use another URL, or replace them with --overwrite",
        )


def begin(url: str) -> None:
    """Take the manifest away: from now on nothing under `url` counts as complete.

    Raises: StorageError if `url` cannot be written, while nothing has been worked in vain.
    """
    storage.delete(storage.join(url, MANIFEST_NAME))
    storage.write_bytes(storage.join(url, REJECTED_NAME), b"")


def gather(
    url: str, groups: Iterable[Group], options: Mapping[str, object]
) -> tuple[list[ShardEntry], Tally]:
    """Write the list of rejected videos, one JSON object a line, from the markers of all groups;
    the shards that there are, and what became of all videos.

    Raises: ShardError if a marker is not of this data set; StorageError.
    """
    entries: list[ShardEntry] = []
    tally, digest = Tally(), options_digest(options)
    with temporary.file() as (lines, path):
        for group in groups:
            marker = _marker_of(url, group, digest)
            tally.add(marker.tally)
            entries += [marker.entry] if marker.entry else []
            with temporary.explained():
                lines.writelines(json.dumps(row).encode() + b"\n" for row in marker.rejected)
                lines.flush()
        storage.upload_file(path, storage.join(url, REJECTED_NAME))
    return entries, tally


def _marker_of(url: str, group: Group, digest: str) -> Marker:
    """The marker of a group that is finished.

    Raises: ShardError if another job has put its own there, or taken it away.
    """
    found = "it is gone"
    with contextlib.suppress(storage.StorageMissingError):
        marker = markers.load(url, group.number)
        if marker.group_digest == markers.group_digest(group, digest):
            return marker
        found = "it was made from other videos or with other options"
    raise ShardError(
        "Another job has written to this output meanwhile",
        where=storage.join(url, markers.name(group.number)),
        found=found,
        do="let it end, then run the same command again, with another URL if both are wanted",
    )


def complete(url: str, manifest: Manifest) -> None:
    """Remove what an earlier sharding left and, last of all, write the manifest."""
    named = {entry.name for entry in manifest.shards}
    named |= {entry.index_name for entry in manifest.shards}
    named |= {markers.name(number) for number in range(manifest.num_groups)}
    for name in storage.list_files(url):
        if _SHARD_FILE.fullmatch(name) and name not in named:
            storage.delete(storage.join(url, name))
    storage.write_bytes(storage.join(url, MANIFEST_NAME), shard_format.dump(manifest))


def options_of(**options: object) -> dict[str, object]:
    """Options as they come back from the manifest: JSON values, nested by kind."""
    plain = {
        name: dataclasses.asdict(value)  # type: ignore[call-overload]
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        else value
        for name, value in options.items()
        if value is not None
    }
    return json.loads(json.dumps(plain))
