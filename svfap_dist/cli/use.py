"""`svfap extract`, `svfap predict`, `svfap export`: inference with trained networks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, app, print_result

Checkpoint = Annotated[
    str,
    typer.Argument(
        help="URL of a run or checkpoint, a folder of `svfap import` or `export`, or "
        "hf://owner/name."
    ),
]
Videos = Annotated[
    list[str],
    typer.Argument(metavar="VIDEO...", help="Video files, folders or shards; paths or URLs."),
]
Region = Annotated[
    str,
    typer.Option(
        help="Part of each frame that is used: voxceleb2, center or full (default: as in training, "
        "else center)."
    ),
]
SamplingRate = Annotated[
    int,
    typer.Option(
        help="Frame stride: source frames per frame of a clip (default: as in training, else 4)."
    ),
]
Names = Annotated[
    str, typer.Option(help="Names of the outputs, in order: happy,sad,... (default: the task's).")
]
Device = Annotated[
    str, typer.Option(help="Device of the network: cpu, cuda, ... (default: cuda if available).")
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Number of decoder threads (default: usable CPUs).")
]


@app.command()
def extract(
    checkpoint: Checkpoint,
    videos: Videos,
    output: Annotated[str, typer.Option("-o", "--output", help="NPZ file to write.")],
    step: Annotated[
        int, typer.Option(min=0, help="Frames from one clip's start to the next; 0: no overlap.")
    ] = 0,
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum clips per forward pass.")] = 8,
    threads: Threads = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Write features of videos to one NPZ file.

    Its arrays (keys, features, videos, starts, fps, ...) are described in docs/use.md.

    Example: svfap extract runs/a faces/ -o features.npz
    """
    network = _load(checkpoint, device, region=region, sampling_rate=sampling_rate)
    from svfap_dist.inference.extract import extract_to
    from svfap_dist.inference.videos import list_videos
    from svfap_dist.progress import Progress

    found = list_videos(videos)
    with Progress("Extracting", len(found)) as progress:
        result = extract_to(
            network,
            found,
            output,
            step=step,
            batch_size=batch_size,
            threads=threads or _cpus(),
            progress=progress.update,
        )
    print_result(result, as_json)


@app.command()
def predict(
    checkpoint: Checkpoint,
    videos: Videos,
    names: Names = "",
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    batch_size: Annotated[
        int,
        typer.Option(
            min=0,
            help="Maximum clips per forward pass; 0: all views of a video, as in `svfap evaluate`.",
        ),
    ] = 0,
    threads: Threads = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Predict labels of videos with a fine-tuned network.

    Prints class scores, or the values of a regression, averaged over several views of each video.

    Example: svfap predict runs/dfew/fold-1 face.mp4
    """
    network = _load(checkpoint, device, names=names, region=region, sampling_rate=sampling_rate)
    from svfap_dist.inference import predict as prediction
    from svfap_dist.inference.videos import list_videos
    from svfap_dist.progress import Progress

    network.check_head(checkpoint)
    found = list_videos(videos)
    with Progress("Predicting", len(found)) as progress:
        result = prediction.predict(
            network,
            found,
            batch_size=batch_size,
            threads=threads or _cpus(),
            progress=progress.update,
        )
    print_result(result, as_json)


@app.command()
def export(
    checkpoint: Checkpoint,
    output: Annotated[
        str,
        typer.Option(
            "-o", "--output", help="Folder or URL to write to (may be left out with --push)."
        ),
    ] = "",
    format: Annotated[
        str,
        typer.Option(
            help="safetensors, for this program; huggingface, with a model card; onnx or "
            "torch-export, for others (default: safetensors, or huggingface with --push)."
        ),
    ] = "",
    license: Annotated[
        str,
        typer.Option(
            "--license",
            "--licence",
            help="License of the weights (default: as stored, or that of the initial weights).",
        ),
    ] = "",
    push: Annotated[
        str,
        typer.Option(
            help="Upload to this repository on the Hugging Face Hub, with the token in HF_TOKEN; "
            "a new one is private.",
            metavar="OWNER/NAME",
        ),
    ] = "",
    names: Names = "",
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    as_json: AsJson = False,
) -> None:
    """Write weights and a config.json for other programs.

    Example: svfap export runs/a -o exported --format onnx
    """
    from svfap_dist.errors import ConfigError
    from svfap_dist.inference import export as exporting

    overrides = _given(names=names, region=region, sampling_rate=sampling_rate)
    if not output and not push:
        raise ConfigError("Missing option", "--output", "it is empty", "give a folder with -o")
    if push and format not in ("", exporting.HUGGINGFACE):
        advice = f"use --format {exporting.HUGGINGFACE}, or leave out --push"
        raise ConfigError("Format cannot be uploaded", "--push", f"--format {format}", advice)
    if push:
        result = exporting.export_to_hub(
            checkpoint, output, push, license=license, overrides=overrides
        )
    else:
        result = exporting.export(
            checkpoint, output, format or "safetensors", license=license, overrides=overrides
        )
    print_result(result, as_json)


def _load(checkpoint: str, device: str, **options: Any) -> Any:
    """Return the network on its device."""
    from svfap_dist.inference.load import load, move

    return move(load(checkpoint, **_given(**options)), device)


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; names as a list."""
    given = {name: value for name, value in options.items() if value}
    if "names" in given:
        given["names"] = [name.strip() for name in given["names"].split(",")]
    return given


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
