"""The manifest of a run's training data: of one data set, or of several that are mixed.

In: `data.url`, or the `[[data.sources]]` of a recipe. Out: one `Manifest`. That of a mixture has
the shards of all its data sets, one set after another, under their whole URLs. So a sample has one
global index, and whatever reads a data set reads a mixture: its URL is then empty. Which sample is
used when is `data.run_order`'s concern.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Collection, Sequence
from typing import Any

from svfap_dist import storage
from svfap_dist.config import Config, check_window
from svfap_dist.errors import ConfigError
from svfap_dist.shards import format as shard_format
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.reader import open_data

log = logging.getLogger(__name__)

_VOXCELEB2_FRAMES = ("voxceleb2", "synthetic")  # sources framed like VoxCeleb2


@dataclasses.dataclass(frozen=True)
class MixedManifest(Manifest):
    """The shards of several data sets, in the order of the recipe's sources."""

    counts: tuple[int, ...] = ()  # shards of each
    kinds: tuple[str, ...] = ()  # of samples of each
    fingerprints: tuple[str, ...] = ()  # of each one's own manifest

    @property
    def shards_of_sources(self) -> tuple[int, ...]:
        """See `Manifest.shards_of_sources`."""
        return self.counts

    @property
    def kinds_of_sources(self) -> tuple[str, ...]:
        """See `Manifest.kinds_of_sources`."""
        return self.kinds

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of everything that decides the order of samples; their places do not."""
        return shard_format.digest(json.dumps(self.fingerprints).encode())


def open_training_data(config: Config, trusted: Collection[str] = ()) -> Manifest:
    """Return the manifest of a run's training data after checking it against the shards.

    Args:
        config: Recipe.
        trusted: Fingerprints of manifests whose shards were checked before; see `open_data`.

    Raises:
        ShardError, StorageError: A manifest is missing or does not match its shards.
        ConfigError: The shortest video is shorter than a clip's window, the samples are of another
            kind than the recipe says, or the data sets of a mixture do not fit each other.
    """
    if not config.data.sources:
        manifest = open_data(config, config.data.url, trusted)
        _check_kind(config.data.url, config.data.kind, manifest)
        set_to = f"set data.region={manifest.region}"
        _check_region(config.data.url, config.data.region, manifest, set_to)
        return manifest
    mixed, manifests = _load_mixture(config)
    for url, manifest in zip(config.data.urls, manifests, strict=True):
        if mixed.fingerprint not in trusted:
            shard_format.check_shards(url, manifest)
        if config.task is None and manifest.kind == "videos":
            check_window(config.data, manifest.min_frames, where=url)
    return mixed


def load_training_manifest(config: Config, url: str) -> Manifest:
    """Return a manifest of training data without looking at the shards.

    Args:
        config: Recipe.
        url: Folder or prefix of the shards; empty: those of the recipe's sources.
    """
    return shard_format.load_manifest(url) if url else _load_mixture(config)[0]


def _load_mixture(config: Config) -> tuple[Manifest, list[Manifest]]:
    """Return the manifest of a mixture, and those of its data sets."""
    urls = config.data.urls
    manifests = [shard_format.load_manifest(url) for url in urls]
    _check_alike(config, manifests)
    # Absolute: the ranks that receive this manifest may run in another folder.
    folders = [url if storage.is_remote(url) else storage.local_path(url) for url in urls]
    shards = tuple(
        dataclasses.replace(entry, name=storage.join(folder, entry.name))
        for folder, manifest in zip(folders, manifests, strict=True)
        for entry in manifest.shards
    )
    mixed = MixedManifest(
        source="mixture",
        profile=manifests[0].profile,
        shuffle_seed=0,
        min_frames=min(manifest.min_frames for manifest in manifests),
        inputs_digest="",
        shards=shards,
        num_parts=manifests[0].num_parts,
        counts=tuple(len(manifest.shards) for manifest in manifests),
        kinds=tuple(manifest.kind for manifest in manifests),
        fingerprints=tuple(manifest.fingerprint for manifest in manifests),
    )
    return mixed, manifests


def _check_alike(config: Config, manifests: Sequence[Manifest]) -> None:
    """Raise ConfigError unless the samples of all data sets can be read and cut in the same way."""
    urls = config.data.urls
    for url, manifest in zip(urls[1:], manifests[1:], strict=True):
        for what, first, other, advice in (
            ("profile", manifests[0].profile, manifest.profile, "--profile"),
            ("parts of a sample", manifests[0].num_parts, manifest.num_parts, "--profile"),
            ("frame size", _size_of(manifests[0]), _size_of(manifest), "--size"),
        ):
            if first != other:
                found = f"{what} {_text(other)}, where {urls[0]} has {_text(first)}"
                do = f"shard one of them again with the same {advice}"
                raise ConfigError("Sources of a mixture differ", url, found, do)
    for source, manifest in zip(config.data.sources, manifests, strict=True):
        _check_kind(source.url, source.kind or config.data.kind, manifest)
        # The clips of a task have one region.
        own = "" if config.task else f'give this source region = "{manifest.region}"'
        _check_region(source.url, source.region or config.data.region, manifest, own)


def _check_region(url: str, region: str, manifest: Manifest, advice: str) -> None:
    """Raise ConfigError if the shards have another region; warn if it may miss the faces.

    Args:
        url: URL of the data set.
        region: Part of the frames that clips are cut from.
        manifest: The data set.
        advice: How to set the stored region in the recipe; "" if it cannot be set.
    """
    if manifest.region not in ("", region):
        found = f"region {region}, where the shards have {manifest.region}"
        do = ", or ".join(filter(None, [advice, f"shard it again with --region {region}"]))
        raise ConfigError("Shards were cut to another region", url, found, do)
    if region == "voxceleb2" and not manifest.region and manifest.source not in _VOXCELEB2_FRAMES:
        log.warning(
            "data.region = voxceleb2 keeps the upper middle of the frames, where VoxCeleb2 shows "
            "the face, but %s is of source %s: unless its videos are framed alike, set "
            "data.region=full (the whole frame) or center (the largest centered square).",
            *(url, manifest.source),
            extra={"once": True},
        )


def _check_kind(url: str, kind: str | None, manifest: Manifest) -> None:
    """Raise ConfigError unless a data set has the kind of samples that the recipe names, if any."""
    if kind not in (None, manifest.kind):
        found = f"kind {kind}, where the shards have {manifest.kind}"
        do = f"set it to {manifest.kind}, or give the URL of other shards"
        raise ConfigError("Shards have samples of another kind", url, found, do)


def _size_of(manifest: Manifest) -> Any:
    """Return the side of the stored frames; None: as they were cut."""
    return (manifest.options.get("train") or {}).get("size")


def _text(value: Any) -> str:
    return "as cut" if value is None else str(value)
