"""`svfap serve`: a page to try a network."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import app
from svfap_dist.cli.use import Checkpoint, Device, Names, Region, SamplingRate, given


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[
        str,
        typer.Option(
            help="Address to listen on; one that other machines can reach needs a token, in "
            "SVFAP_SERVE_TOKEN or --token-file."
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    token_file: Annotated[
        str, typer.Option(help="File with the token that each request must send.")
    ] = "",
    detector: Annotated[
        str,
        typer.Option(
            help="Face detector: haar, yunet:MODEL.onnx, or none for videos that are crops of "
            "faces already."
        ),
    ] = "haar",
    max_mib: Annotated[int, typer.Option(min=1, help="Largest video, in MiB.")] = 64,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Largest frame, in pixels (default: 4K).")
    ] = 3840 * 2160,
    max_seconds: Annotated[int, typer.Option(min=1, help="Longest video, in seconds.")] = 60,
    work_seconds: Annotated[
        int, typer.Option(min=1, help="Longest time to decode a video and find its face.")
    ] = 120,
    queue: Annotated[
        int,
        typer.Option(min=0, help="Maximum number of queued videos while one is being processed."),
    ] = 16,
    names: Names = "",
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    device: Device = "",
) -> None:
    """Serve a page, and a JSON endpoint, to try a network on videos.

    Example: svfap serve runs/dfew/fold-1
    """
    from svfap_dist.progress import waiting

    with waiting("Starting"):
        from svfap_dist.serving import command
    from svfap_dist.video.probe import Limits

    limits = Limits(
        pixels=max_pixels,
        duration=max_seconds,
        file_bytes=max_mib << 20,
        seconds=work_seconds,
        memory_bytes=command.MEMORY_BYTES,
    )
    command.serve(
        checkpoint,
        command.Address(host, port, token_file),
        limits,
        queue=queue,
        detector=detector,
        device=device,
        overrides=given(names=names, region=region, sampling_rate=sampling_rate),
        on_start=lambda page: print(page, flush=True),
    )
