"""`svfap bench`: benchmarks of models, decoders, loaders and checkpoints on this machine."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from svfap_dist.cli.app import AsJson, Overrides, Recipe, bench_app, print_result
from svfap_dist.progress import Progress, say, waiting

Size = Annotated[str, typer.Option(help="Named model size: nano, tiny, small, base or large.")]


@bench_app.command("model")
def bench_model(
    size: Size = "base",
    batch_size: Annotated[int, typer.Option(help="Clips per step.", min=1)] = 8,
    dtype: Annotated[
        str, typer.Option(help="Precision of the step: float32 or bfloat16.")
    ] = "float32",
    device: Annotated[str, typer.Option(help="auto (cuda if available), cpu or cuda.")] = "auto",
    compare: Annotated[
        str, typer.Option(help="vit: also time the plain ViT (default: no comparison).")
    ] = "",
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile for our model.")
    ] = False,
    against: Annotated[
        str,
        typer.Option(help="Folder of another checkout to compare with, in turns (default: none)."),
    ] = "",
    steps: Annotated[int, typer.Option(help="Number of timed steps.", min=1)] = 7,
    as_json: AsJson = False,
) -> None:
    """Time training steps of the autoencoder, and of a straightforward implementation.

    Example: svfap bench model --size base --batch-size 8 --dtype float32
    """
    from svfap_dist.errors import ConfigError

    if compare not in ("", "vit"):
        raise ConfigError("Unknown model to compare with", "--compare", compare, "use vit")
    with _measuring():
        from svfap_dist.bench import model

        result = model.run(
            size,
            batch_size,
            dtype=dtype,
            device=device,
            compile=compile,
            compare_vit=compare == "vit",
            against=against,
            steps=steps,
        )
    print_result(result, as_json)


@bench_app.command("step")
def bench_step(
    size: Annotated[
        str,
        typer.Option(help="Named model size (default: base on a GPU, host time only on a CPU)."),
    ] = "",
    micro_batch: Annotated[
        str, typer.Option(help="Clips per step, as in 32,128 (default: 32,128,256 on a GPU).")
    ] = "",
    stage: Annotated[str, typer.Option(help="DeepSpeed ZeRO stages, as in 1,2.")] = "2",
    compile: Annotated[
        str,
        typer.Option(
            help="torch.compile: off, default or reduce-overhead, or several, as in off,default."
        ),
    ] = "off",
    dtype: Annotated[str, typer.Option(help="Precision: bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="auto (cuda if available), cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Number of timed steps.", min=1)] = 10,
    trace: Annotated[
        str, typer.Option(help="File for a Chrome trace of the first row (default: none).")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Time the training engine: host and device time by phase, operations, waits, loader.

    Example: svfap bench step --micro-batch 32,128,256 --stage 1,2 --compile off,default
    """
    micro_batches, stages = _numbers("--micro-batch", micro_batch), _numbers("--stage", stage)
    with _measuring():
        from svfap_dist.bench import engine_step

        result = engine_step.run(
            size,
            micro_batches,
            stages,
            compile.split(","),
            dtype=dtype,
            device=device,
            steps=steps,
            trace=trace,
        )
    print_result(result, as_json)


def _measuring() -> Progress:
    """Return the progress of the parts of a benchmark that are not counted in rounds."""
    return waiting("Preparing or measuring")


def _numbers(option: str, text: str) -> list[int]:
    """Return the numbers of a comma-separated list."""
    from svfap_dist.errors import ConfigError

    try:
        return [int(word) for word in text.split(",") if word]
    except ValueError as error:
        raise ConfigError("Not a list of numbers", option, text, "write it as 32,128") from error


@bench_app.command("decode")
def bench_decode(
    videos: Annotated[str, typer.Option(help="Folder of videos (default: synthetic faces).")] = "",
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Compare further storage layouts, as a table.")
    ] = False,
    device: Annotated[
        str, typer.Option(help="cpu: PyAV; cuda: DALI, for several numbers of pipelines.")
    ] = "cpu",
    rounds: Annotated[int, typer.Option(help="Number of timed rounds.", min=1)] = 7,
    as_json: AsJson = False,
) -> None:
    """Measure decoded clips per CPU-second of original videos and of `--profile train`.

    Example: svfap bench decode --videos /data/faces
    """
    from svfap_dist.errors import ConfigError

    if device not in ("cpu", "cuda"):
        raise ConfigError("No such device", "--device", device, "use cpu or cuda")
    with _measuring():
        from svfap_dist.bench import decode, decode_device

        if device == "cuda":
            result = decode_device.run(decode.videos_by_profile(videos))
        else:
            result = (decode.run_layouts if layouts else decode.run)(videos, rounds)
    print_result(result, as_json)


@bench_app.command("data")
def bench_data(
    url: Annotated[
        str, typer.Argument(help="Folder or s3:// prefix of shards (default: rendered ones).")
    ] = "",
    overrides: Overrides = None,
    source_url: Annotated[
        str,
        typer.Option(
            "--source",
            help="Shards of the same clips, profile source, for public pipelines (default: none).",
        ),
    ] = "",
    steps: Annotated[int, typer.Option(help="Number of timed batches.", min=4)] = 60,
    rounds: Annotated[int, typer.Option(help="Rounds; each times every pipeline once.", min=1)] = 3,
    public: Annotated[
        bool, typer.Option("--public/--no-public", help="Also time public pipelines.")
    ] = True,
    as_json: AsJson = False,
) -> None:
    """Time the loader, from shards to ready batches, decoding alone, and public pipelines.

    Example: svfap bench data s3://bucket/train --source s3://bucket/source data.decode_workers=4
    """
    with _measuring():
        from svfap_dist.bench import data

        result = data.run(url, source_url, overrides or [], steps, rounds, public)
    print_result(result, as_json)


@bench_app.command("augment")
def bench_augment(
    url: Annotated[
        str, typer.Argument(help="Folder or s3:// prefix of shards (default: rendered ones).")
    ] = "",
    overrides: Overrides = None,
    device: Annotated[str, typer.Option(help="auto (cuda if available), cpu or cuda.")] = "auto",
    steps: Annotated[int, typer.Option(help="Number of timed batches.", min=1)] = 30,
    rounds: Annotated[int, typer.Option(help="Rounds; each times every way once.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Time fine-tuning's augmentation in decode workers and on the device, alone and in the loader.

    Example: svfap bench augment s3://bucket/train data.decode_workers=4
    """
    with _measuring():
        from svfap_dist.bench import augment

        result = augment.run(url, overrides or [], device, steps, rounds)
    print_result(result, as_json)


@bench_app.command("reads")
def bench_reads(
    name: Recipe,
    overrides: Overrides = None,
    sample_bytes: Annotated[int, typer.Option(help="Bytes of a sample.", min=1)] = 240_000,
    ranks: Annotated[str, typer.Option(help="Numbers of ranks, as in 1,8.")] = "1,2,4,8,16",
    parts: Annotated[
        int, typer.Option(help="Parts of a sample in the shards; 1: whole samples.", min=1)
    ] = 4,
    node_gib: Annotated[int, typer.Option(help="Memory of a node, in GiB.", min=1)] = 256,
    as_json: AsJson = False,
) -> None:
    """Replay the requests of a recipe's reads, without data: their sizes and times.

    Example: svfap bench reads svfap_base_voxceleb2 --sample-bytes 240000 --ranks 1,8
    """
    numbers = _numbers("--ranks", ranks)
    with _measuring():
        from svfap_dist.bench import reads

        result = reads.run(
            name,
            overrides or [],
            ranks=numbers,
            sample_bytes=sample_bytes,
            parts=parts,
            node_bytes=node_gib << 30,
        )
    print_result(result, as_json)


@bench_app.command("storage")
def bench_storage(
    url: Annotated[str, typer.Argument(help="Folder or s3:// prefix to write and read an object.")],
    threads: Annotated[int, typer.Option(help="Number of concurrent reads.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds; each times every client once.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure CPU time and throughput of many small and few large ranged reads.

    Example: svfap bench storage s3://bucket/scratch
    """
    with _measuring():
        from svfap_dist.bench import storage

        result = storage.run(url, threads=threads, rounds=rounds)
    print_result(result, as_json)


@bench_app.command("checkpoint")
def bench_checkpoint(
    size: Size = "base",
    zero_stage: Annotated[int, typer.Option(help="DeepSpeed ZeRO stage (0-3).", min=0, max=3)] = 2,
    ranks: Annotated[int, typer.Option(help="Number of ranks on this machine.", min=1)] = 2,
    url: Annotated[
        str, typer.Option(help="Folder or s3:// prefix to save to (default: a temporary folder).")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Saves by each method.", min=1)] = 3,
    dtype: Annotated[
        str, typer.Option(help="Precision of the weights: float32 or bfloat16.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Time checkpoints and how long they block training, and plain torch.save.

    Example: svfap bench checkpoint --size base --ranks 2 --url s3://bucket/bench
    """
    with _measuring():
        from svfap_dist.bench import checkpoint

        result = checkpoint.run(size, zero_stage, ranks, url, rounds, dtype)
    print_result(result, as_json)


@bench_app.command("metrics")
def bench_metrics(
    sizes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SIZE]...", help="Named model sizes (default: tiny and base)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Clips per step.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Number of timed rounds.", min=1)] = 7,
    as_json: AsJson = False,
) -> None:
    """Measure the CPU time of a training step that metrics and logs take.

    Example: svfap bench metrics tiny base
    """
    with _measuring():
        from svfap_dist.bench import metrics

        result = metrics.run(tuple(sizes or ("tiny", "base")), batch_size, rounds)
    print_result(result, as_json)


@bench_app.command("finetune")
def bench_finetune(
    name: Recipe,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Number of timed steps per mode.", min=1)] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure trained parameters, memory and time of a step in each mode of fine-tuning.

    Example: svfap bench finetune finetune_synthetic train.global_batch_size=8
    """
    from svfap_dist.config import recipe

    config = recipe.load(name, overrides or [])
    with _measuring():
        from svfap_dist.bench import finetuning

        result = finetuning.run(config, steps)
    print_result(result, as_json)


@bench_app.command("transfer")
def bench_transfer(
    name: Recipe,
    overrides: Overrides = None,
    init: Annotated[
        str,
        typer.Option(
            metavar="RUN_OR_CHECKPOINT",
            help="Pre-trained run, checkpoint or export (default: the recipe's finetune.init).",
        ),
    ] = "",
    vit_init: Annotated[
        str,
        typer.Option(
            metavar="RUN_OR_CHECKPOINT", help="The same for a plain ViT (default: no such row)."
        ),
    ] = "",
    labels: Annotated[
        str, typer.Option(help="Labels per class, as in 5,10,20,all.")
    ] = "5,10,20,all",
    methods: Annotated[
        str,
        typer.Option(
            help="Among scratch, pretrained, linear, attentive, lora, knn, vit, vit-pretrained."
        ),
    ] = "scratch,pretrained,linear,attentive,knn,vit",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from run.seed on.", min=1)] = 5,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="METHOD:KEY=VALUE", help="Recipe key of one method; repeatable."
        ),
    ] = None,
    part: Annotated[
        str, typer.Option(help="Only a part of the cells: 1/2 for the first of two commands.")
    ] = "1/1",
    as_json: AsJson = False,
) -> None:
    """Compare pre-trained with untrained weights, by labels per class, seeds and folds.

    run.url is the folder of the table: transfer.json, transfer.md and a file per cell. Run the same
    command again to resume.

    Example: svfap bench transfer finetune_custom data.url=shards/mine run.url=runs/table
    --init runs/base --labels 5,10,20,all --set attentive:optim.lr=1e-2
    """
    from svfap_dist.errors import ConfigError, HealthError

    counts = _numbers("--labels", ",".join("0" if n == "all" else n for n in labels.split(",")))
    if not counts or min(counts) < 0:
        raise ConfigError("No labels to train on", "--labels", labels, "write it as 5,10,20,all")
    numbers = _part(part)
    with Progress("Cells of the table") as progress:
        from svfap_dist.bench import transfer
        from svfap_dist.bench.transfer_setup import TransferOptions
        from svfap_dist.train.signals import exit_code

        options = TransferOptions(
            init=init,
            vit_init=vit_init,
            labels=tuple(counts),
            methods=tuple(word for word in methods.split(",") if word),
            seeds=seeds,
            settings=tuple(settings or ()),
            part=numbers,
        )

        def show(result: Any, table: Any) -> None:
            for line in table.cell_lines(result):
                say(line)
            progress.update(len(table.results), len(table.cells()))

        table = transfer.run(name, overrides or [], options, show)
    print(table.to_json() if as_json else "\n".join(table.lines()), end="" if as_json else "\n")
    raise typer.Exit(exit_code(table.stop_reason) or (HealthError.exit_code if table.failed else 0))


def _part(text: str) -> tuple[int, int]:
    """Return both numbers of an option such as 1/2."""
    from svfap_dist.errors import ConfigError

    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        do = "write it as 1/2: the first of two"
        raise ConfigError("No such part", "--part", text, do)
    return int(number), int(parts)
