"""`svfap faces`: crop faces of videos; `svfap shard`: make shards; `svfap shards`: inspect them."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from data_sharding.sources import SOURCES
from svfap_dist.cli.app import AsJson, app, complete_with, print_result, shards_app
from svfap_dist.progress import Progress, waiting


@app.command()
def faces(
    input: Annotated[str, typer.Argument(help="Folder or s3:// prefix of the videos.")],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the crops.")],
    size: Annotated[int, typer.Option(help="Side of the square crops, in pixels.")] = 224,
    margin: Annotated[
        float, typer.Option(help="Margin on each side, as a fraction of the face box.")
    ] = 0.33,
    detector: Annotated[
        str, typer.Option(help="Face detector: haar, or yunet:/path/model.onnx.")
    ] = "haar",
    tracks: Annotated[
        str,
        typer.Option(
            help="best: the longest and largest face track; all: every track of every shot."
        ),
    ] = "best",
    video_seconds: Annotated[
        int,
        typer.Option(
            help="Time limit for one video, in seconds, plus 20 s per MiB; then it is skipped."
        ),
    ] = 120,
    workers: Annotated[
        int | None, typer.Option(help="Number of processes (default: usable CPUs).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Detect, track and crop the faces of videos.

    Writes one mp4 and one JSON file per video. Run the same command again to resume, or to add new
    videos.

    Example: svfap faces /data/videos /data/faces && svfap shard folder /data/faces s3://bucket/x
    """
    from data_sharding.faces import folder
    from data_sharding.faces.crop import FaceOptions

    with Progress("Cropping faces") as progress:
        summary = folder.make_crops(
            input,
            output_url,
            FaceOptions(size, margin, detector, tracks),
            limits=dataclasses.replace(folder.LIMITS, seconds=video_seconds),
            workers=workers,
            progress=lambda done, total, rejected: progress.update(
                done, total, f"{rejected} rejected" if rejected else ""
            ),
        )
    print_result(summary, as_json)


def _list_of_sources() -> str:
    """Return the table of sources for the help of `svfap shard`."""
    tables = []
    for title, is_labeled in (("Sources without labels", False), ("Labeled data sets", True)):
        rows = [row for row in SOURCES.values() if row.is_labeled == is_labeled]
        lines = [f"  {row.name:17} {row.help}\n{'':20}INPUT: {row.input}" for row in rows]
        tables.append("\b\n" + "\n".join([f"{title}:", *lines]))
    return "\n\n".join(tables)


# Options of the source csv: names of columns, "" for none.
Videos = Annotated[
    str | None,
    typer.Option(
        help="csv: folder or s3:// prefix that paths are relative to (default: the list's folder)."
    ),
]
PathColumn = Annotated[
    str | None, typer.Option(help="csv: column of the paths (default: path).", metavar="NAME")
]
LabelColumn = Annotated[
    str | None, typer.Option(help="csv: column of the class (default: label).", metavar="NAME")
]
ValueColumns = Annotated[
    str | None,
    typer.Option(help="csv: columns of numbers to learn in place of a class.", metavar="A,B"),
]
SubjectColumn = Annotated[
    str | None,
    typer.Option(
        help="csv: column of the person (default: subject, if it exists).", metavar="NAME"
    ),
]
FoldColumn = Annotated[
    str | None,
    typer.Option(
        help="csv: column of the fold that tests a video, from 1 (default: fold, if it exists).",
        metavar="NAME",
    ),
]
SplitColumn = Annotated[
    str | None,
    typer.Option(
        help="csv: column of train, val or test (default: split, if it exists).", metavar="NAME"
    ),
]


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


@app.command(epilog=_list_of_sources())
def shard(
    source: Annotated[
        str,
        typer.Argument(
            help=f"Layout of the videos: {', '.join(SOURCES)}.",
            autocompletion=complete_with(*SOURCES),
        ),
    ],
    input: Annotated[
        str, typer.Argument(help="Folder or s3:// prefix of the videos; see the list below.")
    ],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards.")],
    videos: Videos = None,
    path_column: PathColumn = None,
    label_column: LabelColumn = None,
    value_columns: ValueColumns = None,
    subject_column: SubjectColumn = None,
    fold_column: FoldColumn = None,
    split_column: SplitColumn = None,
    profile: Annotated[
        str,
        typer.Option(
            help="source: original video bytes; train: re-encoded for fast decoding.",
            autocompletion=complete_with("source", "train"),
        ),
    ] = "source",
    region: Annotated[
        str | None,
        typer.Option(
            help="With --profile train, part of each frame to keep: full, center (the largest "
            "centered square) or voxceleb2 (default: full for folder and csv, voxceleb2 for "
            "voxceleb2 and synthetic, center for all others).",
            autocompletion=complete_with("full", "center", "voxceleb2"),
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            help="With --profile train, side of a frame in pixels (default: not resized)."
        ),
    ] = None,
    crf: Annotated[
        float | None,
        typer.Option(
            help="With --profile train, CRF of x264, 0-51, lower is better (default: 25)."
        ),
    ] = None,
    min_frames: Annotated[
        int | None,
        typer.Option(
            help="Minimum frames of a video; shorter ones are rejected (default: 61; csv and "
            "images: 1). For labeled data sets: 1."
        ),
    ] = None,
    shuffle_seed: Annotated[int, typer.Option(help="Seed of the sample order.")] = 0,
    samples_per_shard: Annotated[int, typer.Option(help="Maximum samples per shard.")] = 1000,
    workers: Annotated[
        int | None,
        typer.Option(help="Number of processes (default: usable CPUs; 0 or 1: only this one)."),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Address of a Ray cluster to run on; `local` starts one here (default: no Ray)."
        ),
    ] = None,
    max_pixels: Annotated[
        int, typer.Option(help="Maximum pixels of a frame; larger videos are rejected.")
    ] = 8192 * 4320,
    max_duration: Annotated[
        int, typer.Option(help="Maximum duration of a video, in seconds; longer ones are rejected.")
    ] = 3600,
    max_file_bytes: Annotated[
        int, typer.Option(help="Maximum bytes of a file; larger ones are rejected.")
    ] = 2**30,
    video_seconds: Annotated[
        int,
        typer.Option(
            help="Time limit for one video, in seconds, plus 2 s per MiB; then it is rejected."
        ),
    ] = 60,
    overwrite: Annotated[
        bool, typer.Option(help="Replace another data set at OUTPUT_URL.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make tar shards with a manifest of videos (`svfap shards` verifies and shows them).

    Run the same command again to resume, or to add new videos.

    Example: svfap shard voxceleb2 /data/voxceleb2 s3://bucket/shards
    """
    from data_sharding import pipeline as sharding

    given = any(option is not None for option in (region, size, crf))
    train = None
    if given:
        train = sharding.train_profile(region=region, size=size, crf=crf)
    values = None if value_columns is None else tuple(filter(None, _split(value_columns)))
    named = {
        "videos": videos,
        "path": path_column,
        "label": label_column,
        "values": values,
        "subject": subject_column,
        "fold": fold_column,
        "split": split_column,
    }
    columns = {field: name for field, name in named.items() if name is not None}
    limits = sharding.Limits(max_pixels, max_duration, max_file_bytes, video_seconds)
    with Progress(f"Sharding {source}") as progress:
        summary = sharding.shard(
            source,
            input,
            output_url,
            profile=profile,
            train=train,
            columns=sharding.Columns(**columns) if columns else None,
            limits=limits,
            shuffle_seed=shuffle_seed,
            min_frames=min_frames,
            max_samples_per_shard=samples_per_shard,
            workers=workers,
            ray=ray,
            overwrite=overwrite,
            progress=lambda done, total, rejected: progress.update(
                done, total, f"{rejected} rejected" if rejected else ""
            ),
        )
    print_result(summary, as_json)


Shards = Annotated[str, typer.Argument(help="Folder or s3:// prefix of the shards.")]


@shards_app.command("verify")
def shards_verify(
    url: Shards,
    workers: Annotated[
        int | None, typer.Option(help="Shards read in parallel (default: usable CPUs).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read all shards and check them against the manifest.

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
    url: Shards,
    contact_sheet: Annotated[
        str | None,
        typer.Option(
            help="PNG file to write with frames of random samples (default: none).", metavar="PNG"
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the number of samples, hours and bytes, and draw a contact sheet.

    Example: svfap shards show s3://bucket/shards --contact-sheet shards.png
    """
    from data_sharding import pipeline as sharding

    with waiting(f"Reading {url}"):
        if contact_sheet is not None:
            sharding.draw_contact_sheet(url, contact_sheet)
        found = sharding.show(url)
    print_result(found, as_json)
