"""`svfap launch`: hand a recipe to Ray, Slurm or Kubernetes, look at it, stop it with notice; and
`svfap files`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from svfap_dist.cli.app import AsJson, Overrides, Recipe, app, launch_app, print_result
from svfap_dist.progress import say

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be submitted, no more.")]
Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="Ray's dashboard: http://head:8265")
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="As printed, e.g. slurm:4711")]


@launch_app.command("ray")
def launch_ray(
    name: Recipe,
    overrides: Overrides = None,
    address: Address = "http://127.0.0.1:8265",
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME[=VALUE]", help="Variable of driver and ranks; may be repeated."),
    ] = None,
    env_file: Annotated[str, typer.Option(help="Such variables, one to a line.")] = "",
    ship_code: Annotated[
        bool, typer.Option("--ship-code", help="Send this installation's code along.")
    ] = False,
    stop_seconds: Annotated[
        int, typer.Option(min=1, help="Seconds a stopped job has to save a checkpoint.")
    ] = 600,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show its output until it ends.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Submit a recipe as a job of a running Ray cluster (token: RAY_AUTH_TOKEN).

    Example: svfap launch ray svfap_base_voxceleb2 --address http://head:8265
    data.url=s3://bucket/shards run.url=s3://bucket/runs/a --env-file launch/ray/nccl.env --follow
    """
    from svfap_dist.cluster import ray_jobs

    variables = ray_jobs.environment(env or [], env_file)
    wanted = ray_jobs.submission(
        name, overrides or [], env=variables, ship_code=ship_code, stop_seconds=stop_seconds
    )
    if dry_run:
        print("\n".join(wanted.lines()))
        return
    job = ray_jobs.submit(address, wanted)
    print(job, flush=True)
    if not follow:
        return
    try:
        result = ray_jobs.follow(address, job, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        say(f"{job} goes on. `svfap launch stop {job} --address {address}` has it save and end.")
        sys.exit(130)
    say(*result.lines())
    sys.exit(ray_jobs.exit_code(result))


@launch_app.command("slurm")
def launch_slurm(
    name: Recipe,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1)] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="One rank for each.")] = 0,
    ranks_per_node: Annotated[
        int, typer.Option(min=0, help="If other than GPUs: for runs on CPUs.")
    ] = 0,
    time: Annotated[str, typer.Option(help="Of one attempt, e.g. 24:00:00; it is requeued.")] = "",
    notice_seconds: Annotated[
        int, typer.Option(min=1, help="Before that time is over, the ranks are told to save.")
    ] = 300,
    on: Annotated[str, typer.Option(help="srun: a task per rank; ray: a Ray cluster")] = "srun",
    script: Annotated[str, typer.Option(help="An sbatch file instead of the bundled one.")] = "",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="--NAME=VALUE", help="For sbatch, e.g. --option=--partition=gpu"),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a recipe to Slurm.

    Example: svfap launch slurm svfap_base_voxceleb2 --nodes 2 --gpus-per-node 8 --time 24:00:00
    data.url=/shared/shards run.url=/shared/runs/a
    """
    from svfap_dist.cluster import slurm

    allocation = slurm.Allocation(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        ranks_per_node=ranks_per_node,
        time=time,
        notice_seconds=notice_seconds,
        on=on,
        script=script,
        options=tuple(option or ()),
    )
    words = slurm.command(name, overrides or [], allocation)
    print(slurm.shown(words) if dry_run else slurm.submit(words))


@launch_app.command("kubernetes")
def launch_kubernetes(
    name: Recipe,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="With svfap_dist; see launch/kubernetes")] = "svfap",
    nodes: Annotated[int, typer.Option(min=1, help="Worker pods.")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="Ranks of a pod.")] = 1,
    memory: Annotated[str, typer.Option(help="Of a worker pod.")] = "64Gi",
    shared_memory: Annotated[str, typer.Option(help="For NCCL, in a worker pod.")] = "16Gi",
    variables_from: Annotated[
        str, typer.Option(help="Secret whose entries (AWS_...) become variables.")
    ] = "svfap-store",
    dry_run: DryRun = False,
) -> None:
    """Submit a recipe as a KubeRay RayJob, by kubectl.

    Example: svfap launch kubernetes svfap_base_voxceleb2 --image registry/svfap:0.1.0 --nodes 2
    --gpus-per-node 8 data.url=s3://bucket/shards run.url=s3://bucket/runs/a --dry-run
    """
    from svfap_dist.cluster import kubernetes

    pods = kubernetes.Pods(image, nodes, gpus_per_node, memory, shared_memory, variables_from)
    job, text = kubernetes.manifest(name, overrides or [], pods)
    if dry_run:
        print(text, end="")
        return
    kubernetes.submit(text)
    print(job)


@launch_app.command("status")
def launch_status(
    name: JobName, address: Address = "http://127.0.0.1:8265", as_json: AsJson = False
) -> None:
    """What the scheduler says of a job.

    Example: svfap launch status slurm:4711
    """
    from svfap_dist.cluster import kubernetes, ray_jobs, schedulers, slurm

    job = schedulers.parse(name)
    if job.door == "ray":
        result = ray_jobs.status(address, job)
    else:
        result = slurm.status(job) if job.door == "slurm" else kubernetes.status(job)
    print_result(result, as_json)


@launch_app.command("stop")
def launch_stop(
    name: JobName, address: Address = "http://127.0.0.1:8265", as_json: AsJson = False
) -> None:
    """Have a job save a checkpoint and end, and wait until it has.

    Example: svfap launch stop ray:base-1a2b3c4d --address http://head:8265
    """
    from svfap_dist.cluster import kubernetes, ray_jobs, schedulers, slurm

    job = schedulers.parse(name)
    say(f"Waiting for {job} to save a checkpoint and end ...")
    if job.door == "ray":
        result = ray_jobs.stop(address, job)
    else:
        result = slurm.stop(job) if job.door == "slurm" else kubernetes.stop(job)
    print_result(result, as_json)


@app.command()
def files(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="[launch] [monitoring]", help="Default: both.")
    ] = None,
    out: Annotated[str, typer.Option("-o", "--out", help="Folder to copy them into.")] = ".",
) -> None:
    """Copy the bundled recipes and files out.

    Folders launch and monitoring; files that are there are left alone.

    Example: svfap files launch -o my-cluster
    """
    from svfap_dist import bundled
    from svfap_dist.errors import ConfigError

    for folder in folders or ():
        if folder not in bundled.FOLDERS:
            raise ConfigError(
                "No such folder", where=folder, found="not bundled", do="use launch or monitoring"
            )
    written = bundled.copy(Path(out), folders or bundled.FOLDERS)
    print("\n".join(map(str, written)) or "Nothing new to copy.")
