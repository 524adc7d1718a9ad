"""docs/extending.md: its examples run as they are printed, and do what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import make_video
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

import data_sharding.sources
from svfap_dist import cli
from svfap_dist.cluster import schedulers
from svfap_dist.config import OptimConfig, recipe
from svfap_dist.data import masking
from svfap_dist.errors import ConfigError
from svfap_dist.evaluate import metrics as scores
from svfap_dist.model import flops, patches, sizes
from svfap_dist.report import token_maps
from svfap_dist.rng import Stream
from svfap_dist.telemetry import metrics
from svfap_dist.train import optim
from svfap_dist.video import backends, probe

PAGE = Path(__file__).parent.parent / "docs/extending.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TABLES = (
    sizes.ENCODERS,
    masking.MASKS,
    backends.BACKENDS,
    data_sharding.sources.SOURCES,
    scores.SCORE_FUNCTIONS,
    schedulers.SCHEDULERS,
    metrics.PROMETHEUS_METRICS,
)


def _sections() -> dict[str, list[str]]:
    """Return the code blocks by heading."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return {
        title: BLOCK.findall(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the blocks of a section and return their names; take its rows out of the tables."""
    monkeypatch.syspath_prepend(tmp_path)
    before = [dict(table) for table in TABLES]
    written: list[str] = []

    def run_section(title: str) -> dict[str, Any]:
        names: dict[str, Any] = {}
        for block in _sections()[title]:
            file = re.match(r"# (\w+)\.py\n", block)
            if file:
                (tmp_path / f"{file[1]}.py").write_text(block)
                written.append(file[1])
            else:
                exec(compile(block, str(PAGE), "exec"), names)
        return names

    yield run_section
    for table, rows in zip(TABLES, before, strict=True):
        table.clear()
        table.update(rows)
    for module in written:
        sys.modules.pop(module, None)


def _step(model: torch.nn.Module, value: torch.Tensor, layer_decay: float = 1.0) -> None:
    """Take an optimizer step, and check that it changes every parameter."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = optim.adamw(model, OptimConfig(), layer_decay)
    value.backward()
    optimizer.step()
    assert value.isfinite()
    for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
        assert not torch.equal(parameter, old), name


def test_a_new_encoder_pretrains_finetunes_and_counts_its_operations(run: Any) -> None:
    names = run("An encoder")
    assert names["config"].model.encoder == "mixer"
    torch.manual_seed(0)
    pretrained, model = names["pretrained"], names["model"]
    split = masking.MASKS["tube"].split(Stream("test"), 8, 4, 0.5)
    visible, masked = (torch.from_numpy(part)[None] for part in (split.visible, split.masked))
    frames = torch.randint(0, 256, (1, 16, 32, 32, 3), dtype=torch.uint8)
    prediction = pretrained(frames, visible, masked)
    _step(pretrained, patches.masked_patch_loss(prediction, patches.targets(frames, masked)))
    target = torch.tensor([3])
    _step(model, torch.nn.functional.cross_entropy(model(frames), target), layer_decay=0.75)
    ids = optim.layer_ids(dict(model.named_parameters()), sizes.ENCODERS["mixer"])
    assert ids["encoder.patch_embed.proj.weight"] == 0
    assert ids["encoder.blocks.1.mlp.fc2.bias"] == 2
    assert ids["head.weight"] == 3
    with pytest.raises(ConfigError, match=r"no token maps.*Found: mixer.*tpsbt or vit"):
        token_maps.rows(pretrained.encoder, "mixer", patches.normalize(frames))

    with FlopCounterMode(display=False) as counter:
        pretrained(frames, visible, masked)
    work = flops.autoencoder(pretrained.size, visible.shape[1], masked.shape[1])
    # The counter does not count the fused attention of the decoder.
    attention = flops._attention(masked.shape[1], 32, 16)
    assert sum(work.values()) - attention == counter.get_total_flops()


def test_a_new_mask_trains(run: Any) -> None:
    run("A mask")
    config = recipe.load("tiny_cpu", ["mask.kind=band"])
    split = masking.split_tokens(Stream("test"), config.mask, 8, 100)
    assert sorted([*split.visible, *split.masked]) == list(range(800))
    assert len(split.masked) == 8 * round(100 * config.mask.ratio)


def test_a_new_backend_decodes_the_frames_of_the_default_one(run: Any, tmp_path: Path) -> None:
    run("A decode backend")
    assert recipe.load("tiny_cpu", ["decode.backend=rgb"]).decode.backend == "rgb"
    assert "rgb" in backends.available("h264", "cpu")
    make_video(tmp_path / "a.mp4", 61)
    video = (tmp_path / "a.mp4").read_bytes()
    info = probe.probe(video)
    pixels = backends.open_decoder("rgb")(video, info, [0, 5]).pixels
    planes = backends.decode(video, info, [0, 5])
    assert pixels.shape == (2, 48, 64, 3)
    assert np.abs(pixels.mean(3) - planes.y).mean() < 20


def test_a_new_source_is_sharded(run: Any, tmp_path: Path) -> None:
    run("A source of videos")
    for folder in ("happy", "sad", "bored"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        make_video(tmp_path / "in" / folder / "1.mp4", 61)
    command = ["shard", "by_expression", str(tmp_path / "in"), str(tmp_path / "out")]
    done = CliRunner().invoke(cli.app, [*command, "--workers", "1"])
    assert done.exit_code == 0, done.output
    manifest = (tmp_path / "out/manifest.json").read_text()
    assert '"num_samples": 2' in manifest
    assert "no expression: bored" in (tmp_path / "out/rejected.jsonl").read_text()


def test_a_new_score_is_one_that_a_recipe_can_report(run: Any) -> None:
    run("A score")
    given = ['task.metrics=["uar","war","kappa"]', "task.published=[]"]
    assert recipe.load("finetune_dfew", given).task.metrics[-1] == "kappa"
    kappa = scores.SCORE_FUNCTIONS["kappa"].compute
    labels = np.array([0, 0, 1, 1])
    assert kappa(labels, labels) == 1
    assert kappa(labels, np.array([0, 1, 0, 1])) == 0


def test_a_new_scheduler_is_a_verb_and_runs_a_job(run: Any) -> None:
    run("A scheduler")
    urls = ["data.url=shards", "run.url=runs/a"]
    words = ["launch", "background", "tiny_cpu", *urls, "--nice", "5", "--dry-run"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert done.output.startswith("nice -n5 ")
    assert "svfap_dist pretrain tiny_cpu data.url=shards" in done.output
    scheduler = schedulers.scheduler_class("background")()
    job = scheduler.submit(schedulers.Submission("", ["sleep", "60"]))
    assert not scheduler.status(schedulers.parse_job(str(job))).ended
    assert scheduler.stop(job).ended


def test_a_new_prometheus_metric_is_windowed(run: Any) -> None:
    names = run("A Prometheus metric")
    assert names["SLOW_STEPS"].is_counter
    assert names["SLOW_STEPS"] in metrics.windowed_metrics()


def test_every_example_of_the_page_is_tested() -> None:
    tested = set(re.findall(r'run\("(.+)"\)', Path(__file__).read_text()))
    assert tested == _sections().keys()
