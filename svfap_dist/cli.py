"""The command line: `svfap <verb>`.

Verbs only translate words into calls and errors into exit codes. Nothing heavy is imported before a
verb needs it, so that `svfap --help` answers at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Annotated, Any

import typer

from svfap_dist.errors import SvfapError
from svfap_dist.progress import Progress, say

app = typer.Typer(
    name="svfap",
    help="Pre-train facial-affect video models (SVFAP) from shards of face clips.\n\n"
    "First steps: `svfap demo`. Then: `svfap shard`, `svfap pretrain`, `svfap reconstruct`.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
shards_app = typer.Typer(help="Look after shards.", no_args_is_help=True)
checkpoint_app = typer.Typer(help="Look after checkpoints.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(shards_app, name="shards")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="e.g. train.max_steps=100")
]


def main() -> None:
    """Run the command line and exit with the code of what happened."""
    try:
        app()
    except SvfapError as error:
        say(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("Interrupted. Nothing half-written is taken for whole: run the same command again.")
        sys.exit(130)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for everything the demo makes.")] = "svfap-demo",
    videos: Annotated[str, typer.Option(help="Train on this folder of face videos.")] = "",
    overrides: Overrides = None,
) -> None:
    """The whole job at small size on this machine: clips, shards, training, picture, report.

    Example: svfap demo --out /tmp/demo
    """
    from svfap_dist import demo as the_demo

    the_demo.run(out, videos, overrides or [])


@app.command()
def shard(
    source: Annotated[str, typer.Argument(help="folder, voxceleb2 or synthetic")],
    input: Annotated[str, typer.Argument(help="Where the videos are; for synthetic: clips=64")],
    output_url: Annotated[str, typer.Argument(help="Folder or s3:// prefix for the shards")],
    profile: Annotated[str, typer.Option(help="source: video bytes untouched")] = "source",
    min_frames: Annotated[int, typer.Option(help="Shorter videos are left out.")] = 61,
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
    _print(summary, as_json)


@shards_app.command("verify")
def shards_verify(url: str, as_json: AsJson = False) -> None:
    """Read all shards again and check them against the manifest.

    Example: svfap shards verify s3://bucket/shards
    """
    from data_sharding import cli as sharding

    _print(sharding.verify(url), as_json)


@shards_app.command("show")
def shards_show(url: str, as_json: AsJson = False) -> None:
    """What is in the shards: counts, hours, sizes.

    Example: svfap shards show s3://bucket/shards
    """
    from data_sharding import cli as sharding

    _print(sharding.show(url), as_json)


@app.command()
def pretrain(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file or a bundled name")],
    overrides: Overrides = None,
    on: Annotated[
        str, typer.Option(help="local: this process, or torchrun's ranks; ray: a Ray cluster")
    ] = "local",
    as_json: AsJson = False,
) -> None:
    """Pre-train the masked autoencoder.

    Example: svfap pretrain tiny_cpu data.url=shards run.url=runs/a --on ray
    """
    from svfap_dist import recipe
    from svfap_dist.errors import ConfigError

    config = recipe.load(name, overrides or [])
    if on not in ("local", "ray"):
        raise ConfigError("No such place to train", where="--on", found=on, do="use local or ray")
    from svfap_dist.train import pretrain as training

    speaks = os.environ.get("RANK", "0") == "0"  # of torchrun's ranks, one speaks for all
    start = training.preflight(config)
    if start and speaks:
        say(f"Going on from step {start}, the newest checkpoint of {config.run.url}.")
    with Progress("Pre-training", silent=not speaks) as progress:
        if on == "ray":
            from svfap_dist.cluster import ray_train

            show = _show_step(progress)
            result = ray_train.pretrain(config, on_log=show, on_wait=progress.tick)
        else:
            result = training.run(config, on_log=_show_step(progress))
    if speaks:
        _print(result, as_json)
    sys.exit(_exit_code(result.stop_reason))


def _exit_code(stop_reason: str) -> int:
    """0 for a finished run; for one that was asked to stop, what a shell expects of the signal."""
    if stop_reason == "finished":
        return 0
    return 128 + signal.Signals.__members__.get(stop_reason, signal.SIGINT)


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file or a bundled name")],
    overrides: Overrides = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="Values to combine; give as many axes as you like."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Pre-train once for every combination of some values, as Ray tasks; one table at the end.

    Example: svfap sweep tiny_cpu --axis mask.ratio=0.75,0.9 --axis model.pyramid=true,false
    data.url=shards run.url=runs/sweep
    """
    from svfap_dist.cluster import sweep as sweeping

    with Progress("Trials") as progress:
        result = sweeping.run(
            name,
            axis or [],
            overrides or [],
            on_trial=progress.update,
        )
    _print(result, as_json)
    if result.failed:
        say(f"error: {result.failed} of {len(result.trials)} trials failed.")
        raise typer.Exit(1)


def _show_step(progress: Progress) -> Any:
    def show(row: dict[str, Any]) -> None:
        note = f"loss {row['loss']:.4f}  {row['clips_per_second']:.1f} clips/s"
        progress.update(row["step"], row["total_steps"], note)

    return show


@app.command()
def reconstruct(
    checkpoint: Annotated[str, typer.Argument(help="A run, a checkpoint or a .safetensors file")],
    videos: list[str],
    output: Annotated[str, typer.Option("-o", "--output", help="PNG")] = "reconstruction.png",
    show: Annotated[
        str,
        typer.Option(help="frames: what is reconstructed; tokens: where the encoder looks"),
    ] = "frames",
) -> None:
    """A picture of videos: original, masked and reconstructed frames, or where the encoder looks.

    Example: svfap reconstruct runs/a face.mp4 -o picture.png
    """
    from svfap_dist.errors import ConfigError
    from svfap_dist.report import reconstruction, token_maps

    makers = {"frames": reconstruction.make, "tokens": token_maps.make}
    if show not in makers:
        raise ConfigError("No such picture", where="--show", found=show, do="use frames or tokens")
    makers[show](checkpoint, videos, output)
    say(f"Picture: {output}")


@app.command("import")
def import_weights(
    official: Annotated[str, typer.Argument(help="A released .pth file")],
    output: Annotated[str, typer.Option("-o", "--output", help="Folder for our weights")],
    frame_size: Annotated[
        int | None, typer.Option(help="Pixels; default: 160 for SVFAP, 224 for VideoMAE")
    ] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a clip; default: 16")] = None,
    num_heads: Annotated[
        int | None, typer.Option(help="Only for widths that no released network has")
    ] = None,
    decoder_num_heads: Annotated[int | None, typer.Option(help="As --num-heads")] = None,
    stage_depths: Annotated[
        str, typer.Option(help="e.g. 12,6,3, only where no named size has them")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Released SVFAP (fine-tuned) or VideoMAE weights into this project's format.

    Writes OUTPUT/model.safetensors and OUTPUT/config.json, the arguments that build the model.

    Example: svfap import svfap_dfew_fold1.pth -o weights/dfew1
    """
    from svfap_dist.model import weights

    overrides = {
        "frame_size": frame_size,
        "num_frames": num_frames,
        "num_heads": num_heads,
        "decoder_num_heads": decoder_num_heads,
        "stage_depths": _numbers("--stage-depths", stage_depths) if stage_depths else None,
    }
    given = {name: value for name, value in overrides.items() if value is not None}
    _print(weights.import_file(official, output, given), as_json)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from svfap_dist.errors import ConfigError

    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError as error:
        raise ConfigError(
            "Unreadable option", where=option, found=text, do="give whole numbers: 12,6,3"
        ) from error


@app.command()
def report(
    run_url: str, output: Annotated[str, typer.Option("-o", "--output")] = "report.html"
) -> None:
    """One self-contained page about a run.

    Example: svfap report runs/a -o report.html
    """
    from svfap_dist.report import page

    page.make(run_url, output)
    say(f"Report: {output}")


@checkpoint_app.command("ls")
def checkpoint_ls(run_url: str, as_json: AsJson = False) -> None:
    """Committed checkpoints of a run, oldest first.

    Example: svfap checkpoint ls runs/a
    """
    from svfap_dist.train import checkpoint, trained

    steps = checkpoint.committed_steps(run_url)
    if not steps:
        trained.locate(run_url)  # says that there is none, and where it looked
    print(json.dumps({"steps": steps}) if as_json else "\n".join(f"step {step}" for step in steps))


@checkpoint_app.command("verify")
def checkpoint_verify(
    run_url: str,
    step: Annotated[int | None, typer.Argument(help="Default: the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a checkpoint again and check every file's digest.

    Example: svfap checkpoint verify runs/a 1000
    """
    from svfap_dist.train import checkpoint, trained

    if step is None:
        steps = checkpoint.committed_steps(run_url)
        if not steps:
            trained.locate(run_url)  # says that there is none, and where it looked
        step = steps[-1]
    checkpoint.verify(run_url, step)
    print(
        json.dumps({"step": step, "ok": True}) if as_json else f"step {step}: every file is whole"
    )


@bench_app.command("model")
def bench_model(
    size: Annotated[str, typer.Option(help="nano, tiny, small, base or large")] = "base",
    batch_size: Annotated[int, typer.Option(help="Clips of a step.", min=1)] = 8,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    compare: Annotated[str, typer.Option(help="vit: time the plain ViT, too.")] = "",
    compile: Annotated[bool, typer.Option("--compile", help="torch.compile our model.")] = False,
    steps: Annotated[int, typer.Option(help="Steps that are timed.", min=1)] = 7,
    as_json: AsJson = False,
) -> None:
    """Time training steps of the autoencoder beside a straightforward implementation.

    Example: svfap bench model --size base --batch-size 8 --dtype float32
    """
    from svfap_dist.bench import model
    from svfap_dist.errors import ConfigError

    if compare not in ("", "vit"):
        raise ConfigError("Nothing to compare with", where="--compare", found=compare, do="use vit")
    result = model.run(
        size,
        batch_size,
        dtype=dtype,
        device=device,
        compile=compile,
        compare_vit=compare == "vit",
        steps=steps,
    )
    _print(result, as_json)


def _print(result: Any, as_json: bool) -> None:
    """A result object on standard output: as JSON, or as the lines it has for people."""
    import dataclasses

    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
    else:
        print("\n".join(result.lines()))


if __name__ == "__main__":
    main()
