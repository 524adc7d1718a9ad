"""`svfap extract`, `svfap predict`, `svfap export`: what is done with trained networks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, app, print_result

Checkpoint = Annotated[
    str, typer.Argument(help="A run, a checkpoint, or a folder of `svfap import` or `export`")
]
Videos = Annotated[
    list[str], typer.Argument(metavar="VIDEO...", help="Files, folders or shards; URLs too")
]
Region = Annotated[
    str, typer.Option(help="voxceleb2, center or full; default: as in training, else center")
]
SamplingRate = Annotated[
    int, typer.Option(help="Frames from one to the next of a clip; default: as in training, else 4")
]
Names = Annotated[str, typer.Option(help="Of the outputs: happy,sad,...; default: the task's")]
Device = Annotated[str, typer.Option(help="cpu, cuda, ...; default: cuda where there is one")]
BatchSize = Annotated[int, typer.Option(min=1, help="Clips in the network at a time.")]
Threads = Annotated[int | None, typer.Option(min=1, help="That decode; default: by the CPUs.")]


@app.command()
def extract(
    checkpoint: Checkpoint,
    videos: Videos,
    output: Annotated[str, typer.Option("-o", "--output", help="NPZ")],
    step: Annotated[
        int, typer.Option(min=0, help="Frames from clip to clip; 0: clips end to end.")
    ] = 0,
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    batch_size: BatchSize = 8,
    threads: Threads = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Features of videos, as arrays in one NPZ.

    keys, features, videos, starts, fps, ...: docs/use.md says which is what.

    Example: svfap extract runs/a faces/ -o features.npz
    """
    network = _load(checkpoint, device, region=region, sampling_rate=sampling_rate)
    from svfap_dist.inference.extract import extract_to
    from svfap_dist.inference.videos import of_inputs
    from svfap_dist.progress import Progress

    found = of_inputs(videos)
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
    batch_size: BatchSize = 8,
    threads: Threads = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Labels of videos, by a fine-tuned network.

    With their scores, or the values of a regression.

    Example: svfap predict runs/dfew/fold-1 face.mp4
    """
    network = _load(checkpoint, device, names=names, region=region, sampling_rate=sampling_rate)
    from svfap_dist.inference import predict as prediction
    from svfap_dist.inference.videos import of_inputs
    from svfap_dist.progress import Progress

    network.check_head()
    found = of_inputs(videos)
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
    output: Annotated[str, typer.Option("-o", "--output", help="Folder")],
    format: Annotated[
        str, typer.Option(help="safetensors: for this program; onnx: for others")
    ] = "safetensors",
    licence: Annotated[str, typer.Option(help="Under which the weights are given.")] = "",
    names: Names = "",
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    as_json: AsJson = False,
) -> None:
    """Weights and a config.json, for other programs.

    Example: svfap export runs/a -o exported --format onnx
    """
    from svfap_dist.inference import export as exporting

    overrides = _given(names=names, region=region, sampling_rate=sampling_rate)
    result = exporting.export(checkpoint, output, format, licence=licence, overrides=overrides)
    print_result(result, as_json)


def _load(checkpoint: str, device: str, **options: Any) -> Any:
    """The network, on its device."""
    import torch

    from svfap_dist.errors import ConfigError
    from svfap_dist.inference.load import load

    network = load(checkpoint, **_given(**options))
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return network.to(wanted)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            "No such device", where="--device", found=f"{wanted}: {error}", do="use cpu or cuda"
        ) from error


def _given(**options: Any) -> dict[str, Any]:
    """Those that the user gave; names as a list."""
    given = {name: value for name, value in options.items() if value}
    if "names" in given:
        given["names"] = [name.strip() for name in given["names"].split(",")]
    return given


def _cpus() -> int:
    import os

    return len(os.sched_getaffinity(0))
