"""`svfap faces`: crop the faces of videos, for `svfap shard folder`."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result
from svfap_dist.progress import Progress


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
    import dataclasses

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
