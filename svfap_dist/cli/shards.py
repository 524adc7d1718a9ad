"""`svfap shard` and `svfap shards`: from videos to shards, and what is in them."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result, shards_app
from svfap_dist.progress import Progress


@app.command()
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help="folder, voxceleb2, synthetic, or a labelled set: dfew, ferv39k, mafw, cremad, "
            "ravdess, enterface05, werewolfxl, avcaffe, firstimpressions (see docs/datasets.md)"
        ),
    ],
    input: Annotated[str, typer.Argument(help="Where the videos are; for synthetic: clips=64")],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards")],
    profile: Annotated[str, typer.Option(help="source: video bytes untouched")] = "source",
    min_frames: Annotated[
        int, typer.Option(help="Shorter are left out; 1 for labelled sets.")
    ] = 61,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the order in the shards.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(help="Processes that read and probe; default: by the CPUs.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace another data set there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Videos to tar shards with a manifest.

    Example: svfap shard voxceleb2 /data/voxceleb2 s3://bucket/shards
    """
    from data_sharding import cli as sharding

    with Progress(f"Sharding {source}") as progress:
        summary = sharding.shard(
            source,
            input,
            output_url,
            profile=profile,
            shuffle_seed=shuffle_seed,
            min_frames=min_frames,
            max_samples_per_shard=samples_per_shard,
            workers=workers,
            overwrite=overwrite,
            progress=lambda done, total, rejected: progress.update(
                done, total, f"{rejected} left out" if rejected else ""
            ),
        )
    print_result(summary, as_json)


@shards_app.command("verify")
def shards_verify(url: str, as_json: AsJson = False) -> None:
    """Read all shards again and check them against the manifest.

    Example: svfap shards verify s3://bucket/shards
    """
    from data_sharding import cli as sharding

    print_result(sharding.verify(url), as_json)


@shards_app.command("show")
def shards_show(url: str, as_json: AsJson = False) -> None:
    """What is in the shards: counts, hours, sizes.

    Example: svfap shards show s3://bucket/shards
    """
    from data_sharding import cli as sharding

    print_result(sharding.show(url), as_json)
