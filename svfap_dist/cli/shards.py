"""`svfap shard` and `svfap shards`: from videos to shards, and what is in them."""

from __future__ import annotations

from typing import Annotated

import typer

from data_sharding.sources import SOURCES
from svfap_dist.cli.app import AsJson, app, print_result, shards_app
from svfap_dist.progress import Progress


def _list_of_sources() -> str:
    """Return the table of sources for the help of `svfap shard`; \\b keeps click from wrapping."""
    tables = []
    for title, is_labelled in (("Sources without labels", False), ("Labelled sets", True)):
        rows = [row for row in SOURCES.values() if row.is_labelled == is_labelled]
        lines = [f"  {row.name:17} {row.help}\n{'':20}INPUT: {row.input}" for row in rows]
        tables.append("\b\n" + "\n".join([f"{title}:", *lines]))
    return "\n\n".join(tables)


@app.command(epilog=_list_of_sources())
def shard(
    source: Annotated[str, typer.Argument(help=f"Layout of the videos: {', '.join(SOURCES)}.")],
    input: Annotated[
        str, typer.Argument(help="Folder or s3:// prefix of the videos; see the list below.")
    ],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards")],
    profile: Annotated[
        str, typer.Option(help="source: video bytes untouched; train: stored to be decoded fast.")
    ] = "source",
    region: Annotated[
        str | None,
        typer.Option(help="train: what is cut out: voxceleb2 (the default), center or full."),
    ] = None,
    size: Annotated[
        int | None, typer.Option(help="train: pixels of a side; default: as it is cut.")
    ] = None,
    crf: Annotated[
        float | None, typer.Option(help="train: x264's quality, lower is better and larger.")
    ] = None,
    min_frames: Annotated[
        int, typer.Option(help="Shorter are left out; 1 for labelled sets.")
    ] = 61,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the order in the shards.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="At most so many.")] = 1000,
    workers: Annotated[
        int | None, typer.Option(help="Processes that examine videos; default: by the CPUs.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Make shards on this Ray cluster; `local` starts one here."),
    ] = None,
    max_pixels: Annotated[int, typer.Option(help="Videos with larger frames are left out.")] = 8192
    * 4320,
    max_duration: Annotated[int, typer.Option(help="Longer videos are left out: seconds.")] = 3600,
    max_file_bytes: Annotated[int, typer.Option(help="Larger files are left out.")] = 2**30,
    video_seconds: Annotated[
        int, typer.Option(help="Work on one video before it is left out; 2 s more per MiB.")
    ] = 60,
    overwrite: Annotated[bool, typer.Option(help="Replace another data set there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Videos to tar shards with a manifest.

    Example: svfap shard voxceleb2 /data/voxceleb2 s3://bucket/shards
    """
    from data_sharding import pipeline as sharding

    given = any(option is not None for option in (region, size, crf))
    train = sharding.train_profile(region=region, size=size, crf=crf) if given else None
    limits = sharding.Limits(max_pixels, max_duration, max_file_bytes, video_seconds)
    with Progress(f"Sharding {source}") as progress:
        summary = sharding.shard(
            source,
            input,
            output_url,
            profile=profile,
            train=train,
            limits=limits,
            shuffle_seed=shuffle_seed,
            min_frames=min_frames,
            max_samples_per_shard=samples_per_shard,
            workers=workers,
            ray=ray,
            overwrite=overwrite,
            progress=lambda done, total, rejected: progress.update(
                done, total, f"{rejected} left out" if rejected else ""
            ),
        )
    print_result(summary, as_json)


@shards_app.command("verify")
def shards_verify(
    url: str,
    workers: Annotated[
        int | None, typer.Option(help="Shards read at a time; default: by the CPUs.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read all shards again and check them against the manifest.

    Example: svfap shards verify s3://bucket/shards
    """
    from data_sharding import pipeline as sharding

    with Progress("Verifying") as progress:
        verified = sharding.verify(
            url,
            workers=workers,
            progress=lambda done, total, damaged: progress.update(
                done, total, f"{damaged} damaged" if damaged else ""
            ),
        )
    print_result(verified, as_json)


@shards_app.command("show")
def shards_show(
    url: str,
    contact_sheet: Annotated[
        str | None,
        typer.Option(help="Write a PNG of frames of random samples there.", metavar="PNG"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What is in the shards: counts, hours, sizes, and how they look.

    Example: svfap shards show s3://bucket/shards --contact-sheet shards.png
    """
    from data_sharding import pipeline as sharding

    if contact_sheet is not None:
        sharding.draw_contact_sheet(url, contact_sheet)
    print_result(sharding.show(url), as_json)
