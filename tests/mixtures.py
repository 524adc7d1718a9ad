"""Recipes and manifests of mixtures."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loaders import config_of

from svfap_dist.config import Config, SourceConfig
from svfap_dist.shards.format import Manifest
from svfap_dist.shards.mixture import MixedManifest


def mixture_of(weights: Sequence[float], urls: Sequence[str] = (), **data) -> Config:
    """A recipe with a source for each weight, called s0, s1, ... unless there are URLs."""
    urls = urls or [f"s{number}" for number in range(len(weights))]
    pairs = zip(urls, weights, strict=True)
    sources = tuple(SourceConfig(url=url, weight=weight) for url, weight in pairs)
    return config_of(sources=sources, **data)


def mixed_manifest(manifests: Sequence[Manifest]) -> MixedManifest:
    """The manifest of a mixture of data sets s0, s1, ..., which need not exist."""
    return MixedManifest(
        **{
            **vars_of(manifests[0]),
            "shards": tuple(
                dataclasses.replace(entry, name=f"s{number}/{entry.name}")
                for number, manifest in enumerate(manifests)
                for entry in manifest.shards
            ),
        },
        kinds=tuple(manifest.kind for manifest in manifests),
        counts=tuple(len(manifest.shards) for manifest in manifests),
        fingerprints=tuple(manifest.fingerprint for manifest in manifests),
    )


def vars_of(manifest: Manifest) -> dict:
    return {field.name: getattr(manifest, field.name) for field in dataclasses.fields(manifest)}
