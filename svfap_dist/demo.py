"""`svfap demo`: the whole pipeline at small size on one machine.

Clips (rendered, or a folder of videos) -> shards -> two Ray Train workers with DeepSpeed ZeRO-2 ->
checkpoint -> reconstruction picture of held-out faces -> report. Each step is the call behind the
verb of the same name, so the demo is also the shortest example of how they fit together.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from data_sharding import pipeline as sharding
from data_sharding import sources
from svfap_dist import storage
from svfap_dist.config import recipe
from svfap_dist.errors import ConfigError
from svfap_dist.progress import Progress, say

# Faces that fill the frame: of 224 pixels, an expression changes some 30 around mouth and brows.
_FRAMES = "frames=72,crop=104,size=96"
_TRAIN_CLIPS = f"clips=96,identities=24,first_identity=0,{_FRAMES}"
_HELD_OUT_CLIPS = f"clips=16,identities=8,first_identity=24,{_FRAMES}"
_EVERY = 7  # every seventh of the given videos is held out
_PICTURED = 3  # videos in the picture
_RUN_MARK = ".svfap-demo"


def run(out: str, videos: str, overrides: Sequence[str]) -> None:
    """Run the demo.

    Args:
        out: Folder for all files of the demo.
        videos: Folder of face videos to train on; empty: rendered faces.
        overrides: Texts `section.key=value`, for the recipe tiny_cpu.

    Raises:
        SvfapError: The error of the step that fails.
    """
    out = storage.local_path(out)
    run_url = _fresh_run_folder(os.path.join(out, "run"))
    shards = os.path.join(out, "shards-of-videos" if videos else "shards")
    train_url, held_out_url = os.path.join(shards, "train"), os.path.join(shards, "held-out")
    if videos:
        source, inputs = _split(storage.local_path(videos), os.path.join(out, "videos"))
    else:
        source, inputs = "synthetic", (_TRAIN_CLIPS, _HELD_OUT_CLIPS)
    for text, url in zip(inputs, (train_url, held_out_url), strict=True):
        _shard(source, text, url)

    region = {"synthetic": "full", "folder": "center"}.get(source, source)
    urls = [f"data.url={train_url}", f"data.eval_url={held_out_url}", f"run.url={run_url}"]
    config = recipe.load("tiny_cpu", [*urls, f"data.region={region}", *overrides])
    result = _pretrain(config)

    from svfap_dist.report import page, reconstruction

    picture = os.path.join(run_url, "pictures", "reconstruction.png")
    faces = _some_videos(source, inputs[1], os.path.join(out, "faces"))
    report = os.path.join(run_url, "report.html")
    with Progress("Drawing the picture and the report"):
        reconstruction.make(run_url, faces, picture)
        page.make(run_url, report)
    _print_summary(run_url, result, picture, report, faces[0])


def _fresh_run_folder(folder: str) -> str:
    """Return an empty run folder; delete one of an earlier demo, and nothing else."""
    if os.path.isdir(folder) and os.listdir(folder):
        if not os.path.exists(os.path.join(folder, _RUN_MARK)):
            found, advice = "files that no demo wrote", "choose another folder with --out"
            raise ConfigError("Folder is not empty", folder, found, advice)
        shutil.rmtree(folder)
    storage.write_bytes(os.path.join(folder, _RUN_MARK), b"made by svfap demo\n")
    return folder


def _split(videos: str, folder: str) -> tuple[str, tuple[str, str]]:
    """Link the videos into a training and a held-out folder: every seventh clip is held out.

    A held-out clip may show a subject of the training set, since a small folder has too few
    subjects to hold out; rendered faces have enough.
    """
    paths = [video.where for video in sources.find_source("folder").samples(videos)]
    if len(paths) < _EVERY:
        advice = f"give a folder of at least {_EVERY} videos"
        raise ConfigError("Too few videos to hold some out", videos, f"{len(paths)} videos", advice)
    shutil.rmtree(folder, ignore_errors=True)
    for number, path in enumerate(sorted(paths), start=1):
        part = "train" if number % _EVERY else "held-out"
        link = os.path.join(folder, part, os.path.relpath(path, videos))
        os.makedirs(os.path.dirname(link), exist_ok=True)
        os.symlink(path, link)
    source = "voxceleb2" if all(_is_voxceleb2(path, videos) for path in paths) else "folder"
    return source, (os.path.join(folder, "train"), os.path.join(folder, "held-out"))


def _is_voxceleb2(path: str, root: str) -> bool:
    parts = os.path.relpath(path, root).split(os.sep)
    return len(parts) == 3 and parts[0].startswith("id") and parts[0][2:].isdigit()


def _shard(source: str, text: str, url: str) -> None:
    with Progress(f"Sharding into {url}") as progress:
        summary = sharding.shard(
            source,
            text,
            url,
            overwrite=True,  # shards of an earlier version, or of other videos
            progress=lambda done, total, rejected: progress.update(done, total),
        )
    for line in summary.lines():
        say(f"  {line}")


def _pretrain(config: Any) -> Any:
    from svfap_dist.cluster import ray_train

    with Progress("Starting Ray and two ranks; pre-training", config.train.max_steps) as progress:

        def show(row: dict[str, Any]) -> None:
            note = f"loss {row['loss']:.3f}  {row['clips_per_second']:.1f} clips/s"
            progress.update(row["step"], note=note)

        return ray_train.train(config, on_log=show, on_wait=progress.tick)


def _some_videos(source: str, text: str, folder: str) -> list[str]:
    """Write a few held-out videos as files, for the picture and for the user."""
    paths = []
    for video in itertools.islice(sources.find_source(source).samples(text), _PICTURED):
        path = os.path.join(folder, f"{video.key.replace('/', '-')}.{video.suffix}")
        storage.write_bytes(path, video.read())
        paths.append(path)
    return paths


def _print_summary(run_url: str, result: Any, picture: str, report: str, face: str) -> None:
    say("")
    for line in result.lines():
        say(line)
    svfap = _own_command()
    say(
        f"""
Report      {report}
Picture     {picture}   (held-out faces: original, masked, reconstructed)
Run         {run_url}   (config.toml, metrics.jsonl, events.jsonl, checkpoints/)

Next:
  {svfap} reconstruct {run_url} {face} -o face.png
  {svfap} demo --videos FOLDER_OF_FACE_VIDEOS
  {svfap} shard folder FOLDER_OF_FACE_VIDEOS shards
  {svfap} pretrain tiny_cpu data.url=shards data.region=center run.url=runs/mine --on ray
      (data.region=center: the largest centered square of each frame)"""
    )


def _own_command() -> str:
    """Return how to call this program from the current folder."""
    if shutil.which("svfap"):
        return "svfap"
    if os.path.basename(sys.argv[0]) == "__main__.py":
        return "python -m svfap_dist"
    return os.path.relpath(sys.argv[0])
