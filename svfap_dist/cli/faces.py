"""`svfap faces`: from videos that show more than a face to crops for `svfap shard folder`."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, app, print_result
from svfap_dist.progress import Progress


@app.command()
def faces(
    input: Annotated[str, typer.Argument(help="Folder or s3:// prefix of videos")],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the crops")],
    size: Annotated[int, typer.Option(help="Pixels of a side of the crops.")] = 224,
    margin: Annotated[
        float, typer.Option(help="Around the face on each side, in sides of the face.")
    ] = 0.33,
    detector: Annotated[str, typer.Option(help="haar, or yunet:/path/model.onnx")] = "haar",
    tracks: Annotated[
        str,
        typer.Option(help="best: the face longest and largest in view; all: each, of each shot"),
    ] = "best",
    video_seconds: Annotated[
        int, typer.Option(help="Work on one video before it is left out; 20 s more per MiB.")
    ] = 120,
    workers: Annotated[int | None, typer.Option(help="Processes; default: by the CPUs.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the faces of videos and cut them out.

    Faces are followed from frame to frame; one mp4 and one JSON per video.

    Run the same command again to go on after a stop, or to add videos that are new.

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
                done, total, f"{rejected} left out" if rejected else ""
            ),
        )
    print_result(summary, as_json)
