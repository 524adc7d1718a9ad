"""`svfap plan` and `svfap doctor`: predictions and checks before a run."""

from __future__ import annotations

from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, Overrides, Recipe, app, print_result
from svfap_dist.progress import Progress, waiting


@app.command()
def plan(
    name: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(help="Number of nodes.", min=1)] = 1,
    gpus_per_node: Annotated[
        int,
        typer.Option(
            help="Ranks per node; with --gpu cpu: processes that share the machine.", min=1
        ),
    ] = 1,
    gpu: Annotated[
        str,
        typer.Option(
            help="GPU model: b200, h200, h100, a100, l40s, l4, a10, ...; cpu: this machine."
        ),
    ] = "cpu",
    mfu: Annotated[
        float | None,
        typer.Option(
            help="Model FLOP utilization: fraction of the GPU's peak (default: an estimate).",
            min=0.001,
        ),
    ] = None,
    decode_rate: Annotated[
        float | None,
        typer.Option(
            help="Clips decoded per CPU-second (default: measured on data.url).", min=0.001
        ),
    ] = None,
    network_gbps: Annotated[
        float | None,
        typer.Option(help="Network bandwidth of a node, Gbit/s (default: an estimate).", min=0.001),
    ] = None,
    storage_rate: Annotated[
        float | None,
        typer.Option(
            help="Read rate of a node from the store, MB/s (default: measured on data.url).",
            min=0.001,
        ),
    ] = None,
    cores_per_node: Annotated[
        int | None,
        typer.Option(help="CPU cores per node (default: the recipe's, or this machine's).", min=1),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Samples of the data set (default: those of data.url).", min=1),
    ] = None,
    host_ms: Annotated[
        float | None,
        typer.Option(
            help="CPU time in which the host launches a step, ms (default: measured here; "
            "see svfap bench step).",
            min=0.0,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict throughput, hours and memory of pre-training.

    Prints clips per second, the bottleneck, and memory per rank; every input with its source.

    Example: svfap plan svfap_base_voxceleb2 --nodes 2 --gpus-per-node 8 --gpu h100
    --samples 1000000
    """
    from svfap_dist.config import recipe

    config = recipe.load(name, overrides or [])
    with waiting("Measuring what the plan needs"):
        from svfap_dist.plan import planner

        known = planner.KnownRates(
            mfu, decode_rate, network_gbps, storage_rate, cores_per_node, samples, host_ms
        )
        result = planner.plan_run(config, nodes, gpus_per_node, gpu, known)
    print_result(result, as_json)


@app.command()
def doctor(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[RECIPE]",
            help="Recipe of `svfap pretrain` or `finetune` (default: check this machine only).",
        ),
    ] = "",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, storage and cluster.

    Each finding is ok, warn or fail, with advice. Exits with 9 if one fails.

    Example: svfap doctor tiny_cpu data.url=s3://bucket/shards run.url=s3://bucket/runs/a
    """
    from svfap_dist.config import recipe

    config = recipe.load(name, overrides or []) if name else None
    with Progress("Examining") as progress:
        from svfap_dist.doctor import examine

        result = examine.run(config, progress.update)
    print_result(result, as_json)
    if result.fail:
        raise typer.Exit(examine.EXIT_CODE)
