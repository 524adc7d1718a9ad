"""`svfap extract`, `svfap predict`, `svfap export`: inference with trained networks."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, app, complete_with, print_result
from svfap_dist.parallel.cpus import usable_cpus
from svfap_dist.progress import Progress, waiting

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
        "else center).",
        autocompletion=complete_with("full", "center", "voxceleb2"),
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
    videos: Annotated[
        list[str],
        typer.Argument(
            metavar="VIDEO...",
            help="Video files, folders, shards or lists of files (.txt); paths or URLs.",
        ),
    ],
    output: Annotated[
        str,
        typer.Option("-o", "--output", help="NPZ file, or folder or prefix of Parquet files."),
    ],
    format: Annotated[
        str,
        typer.Option(
            help="npz: one file; parquet: one file per shard or per 256 videos, resumable "
            "(default: npz, or parquet with --ray)."
        ),
    ] = "",
    pooled: Annotated[
        bool, typer.Option("--pooled", help="parquet: a row per video, the mean of its clips.")
    ] = False,
    retry_rejected: Annotated[
        bool,
        typer.Option(
            "--retry-rejected", help="parquet: do finished parts with unusable videos again."
        ),
    ] = False,
    ray: Annotated[
        str,
        typer.Option(help="parquet: extract on this Ray cluster; local starts one here."),
    ] = "",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum workers on the cluster (default: one per GPU, else --threads CPUs).",
        ),
    ] = None,
    step: Annotated[
        int, typer.Option(min=0, help="Frames from one clip's start to the next; 0: no overlap.")
    ] = 0,
    region: Region = "",
    sampling_rate: SamplingRate = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Maximum clips per forward pass.")] = 8,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of decoder threads (default: usable CPUs; with --ray 2 a worker)."
        ),
    ] = None,
    device: Device = "",
    as_json: AsJson = False,
) -> None:
    """Write features of videos to one NPZ file, or to Parquet files.

    docs/use.md describes their contents. With --format parquet, run the same command again to
    resume.

    Example: svfap extract runs/a faces/ -o features.npz
    """
    from svfap_dist.errors import ConfigError

    format = format or ("parquet" if ray else "npz")
    if format not in ("npz", "parquet"):
        raise ConfigError("Unknown format", "--format", format, "use npz or parquet")
    options = {"--ray": ray, "--pooled": pooled, "--retry-rejected": retry_rejected}
    if format == "npz" and any(options.values()):
        option = next(name for name, given in options.items() if given)
        found, advice = "--format npz", "use --format parquet"
        raise ConfigError("Option requires another format", option, found, advice)
    from svfap_dist.inference.output import check_output

    check_output(output, format)
    if format == "parquet":
        import pyarrow  # noqa: F401 - a missing package is an error before anything is read

        from svfap_dist.inference.extract_parts import ExtractJob

        if ray:  # workers have other working folders
            checkpoint, output, *videos = map(_absolute, (checkpoint, output, *videos))
        job = ExtractJob(
            checkpoint,
            output,
            overrides=given(region=region, sampling_rate=sampling_rate),
            step=step,
            pooled=pooled,
            batch_size=batch_size,
            threads=threads or (2 if ray else usable_cpus()),
            device=device,
        )
        print_result(_extract_parts(job, videos, ray, workers, retry_rejected), as_json)
        return
    network = _load(checkpoint, device, region=region, sampling_rate=sampling_rate)
    from svfap_dist.inference.extract import extract_to
    from svfap_dist.inference.videos import list_videos

    with waiting("Listing the videos"):
        found = list_videos(videos)
    with Progress("Extracting", len(found)) as progress:
        result = extract_to(
            network,
            found,
            output,
            step=step,
            batch_size=batch_size,
            threads=threads or usable_cpus(),
            isolated=True,
            progress=progress.update,
        )
    print_result(result, as_json)


def _absolute(url: str) -> str:
    from svfap_dist import storage

    return url if storage.is_remote(url) else storage.local_path(url)


def _extract_parts(
    job: Any, videos: list[str], address: str, workers: int | None, retry_rejected: bool
) -> Any:
    """Extract to Parquet, here or on a Ray cluster."""
    import dataclasses

    from svfap_dist.inference import extract_parts as extraction
    from svfap_dist.inference.load import load, move
    from svfap_dist.inference.parts import plan_parts

    with waiting(f"Loading {job.checkpoint}"):
        network = load(job.checkpoint, **job.overrides)
        job = dataclasses.replace(job, network_digest=extraction.digest_network(network))
    with waiting("Listing the videos"):
        parts = plan_parts(videos)

    def run(missing: Any, on_video: Any) -> Any:
        if address:
            from svfap_dist.cluster.extract import run_on_ray

            return run_on_ray(job, missing, address, workers, usable_cpus())
        extractor = extraction.PartExtractor(job, move(network, job.device))
        return extraction.run_locally(extractor, missing, on_video)

    total = sum(part.num_videos for part in parts)
    with Progress("Extracting", total) as progress:
        return extraction.extract_parts(
            job,
            parts,
            network.num_features,
            run,
            lambda done, note: progress.update(done, note=note),
            retry_rejected,
        )


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

    network.check_head(checkpoint)
    with waiting("Listing the videos"):
        found = list_videos(videos)
    with Progress("Predicting", len(found)) as progress:
        result = prediction.predict(
            network,
            found,
            batch_size=batch_size,
            threads=threads or usable_cpus(),
            isolated=True,
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

    overrides = given(names=names, region=region, sampling_rate=sampling_rate)
    if not output and not push:
        raise ConfigError("Missing option", "--output", "it is empty", "give a folder with -o")
    if push and format not in ("", exporting.HUGGINGFACE):
        advice = f"use --format {exporting.HUGGINGFACE}, or leave out --push"
        raise ConfigError("Format cannot be uploaded", "--push", f"--format {format}", advice)
    with waiting(f"Exporting {checkpoint}"):
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
    with waiting(f"Loading {checkpoint}"):  # imports of torch, perhaps a download
        from svfap_dist.inference.load import load, move

        return move(load(checkpoint, **given(**options)), device)


def given(**options: Any) -> dict[str, Any]:
    """Return the options that were given; names as a list.

    Args:
        **options: Fields of `ModelInfo`; empty or 0: not given.
    """
    found = {name: value for name, value in options.items() if value}
    if "names" in found:
        found["names"] = [name.strip() for name in found["names"].split(",")]
    return found
