"""What a recipe may say, and how what it may not say is refused."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest

from svfap_dist.bundled import folder
from svfap_dist.config import (
    Config,
    SourceConfig,
    TaskConfig,
    TrackConfig,
    changes,
    check_window,
    check_world_size,
    recipe,
)
from svfap_dist.data import masking
from svfap_dist.errors import ConfigError


@pytest.mark.parametrize(
    "path", sorted(folder("launch/recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_bundled_recipe_loads_by_name_and_by_path(path):
    config = recipe.load(path.stem)
    assert recipe.load(str(path)) == config
    assert path.stem in recipe.names()


OLD = json.loads((Path(__file__).parent / "recipes_f84d50d.json").read_text())

# The values with which the demo's fine-tuning stayed at chance.
_LARGER = ["data.num_frames=16", "data.sampling_rate=4", "data.frame_size=96"]
_LARGER += ["model.patch_size=16"]
_MEAN = ["finetune.pool=mean", "finetune.grid=3", "finetune.stages=last"]
_MEAN += ["finetune.layer_decay=0.75", "optim.lr=3.2e-2", "data.region=voxceleb2"]
_MEAN += ["train.max_steps=200", "train.checkpoint_every=200"]
AT_CHANCE = {"tiny_cpu": _LARGER, "finetune_synthetic": _LARGER + _MEAN}


@pytest.mark.parametrize("name", OLD)
def test_bundled_recipe_resolves_to_what_it_was_before_recipes_could_extend(name, caplog):
    """Values and fingerprint of f84d50d, whose ten fine-tuning recipes repeated each other."""
    then = recipe.from_stored(OLD[name]["config"], where="f84d50d")
    since = ["data.order_version=1", "data.feeders=0", "decode.pipelines=4"]
    since += [f"cluster.use_gpu={json.dumps(then.cluster.use_gpu)}"]  # auto now, for a task
    since += ["task.reproduced=[]", "task.reproduced_source="] if then.task else []
    since += AT_CHANCE.get(name, [])
    assert recipe.load(name, since) == then
    assert then.fingerprint == OLD[name]["fingerprint"]


def test_the_recipes_for_one_gpu_and_for_eight_are_the_same_run():
    one, eight = (recipe.load(f"svfap_base_voxceleb2{end}") for end in ("_1gpu", ""))
    assert one.fingerprint == eight.fingerprint


def test_a_stored_recipe_without_an_order_version_has_the_first():
    config = recipe.load("tiny_cpu")
    assert config.data.order_version == 2
    tables = tomllib.loads(recipe.dumps(config))
    assert recipe.from_stored(tables, where="config.toml") == config
    tables["data"].pop("order_version")
    assert recipe.from_stored(tables, where="config.toml").data.order_version == 1
    assert recipe.from_tables(tables, where="tiny_cpu.toml").data.order_version == 2


def test_old_names_are_understood_with_one_warning_each(tmp_path, caplog):
    path = tmp_path / "old.toml"
    path.write_text('extends = "tiny_cpu"\n[data]\ncolours = "workers"\nregion = "centre"\n')
    config = recipe.load(str(path))
    assert (config.data.colors, config.data.region) == ("workers", "center")
    assert recipe.load(str(path), ["data.colours=device"]).data.colors == "device"
    assert recipe.load(str(path), ["data.colors=device"]).data.colors == "device"
    tables = tomllib.loads(recipe.dumps(config))
    tables["data"]["colours"] = tables["data"].pop("colors")
    assert recipe.from_tables(tables, where="config.toml") == config
    assert "colours" in tables["data"], "the caller's tables are left alone"
    first, second = sorted(set(caplog.messages))
    assert "data.colours is now called data.colors" in first
    assert 'data.region = "center"' in second
    with pytest.raises(ConfigError, match="given twice"):
        recipe.from_tables({"data": {"colours": "auto", "colors": "auto"}}, where="both")


def test_recipes_extend_each_other_in_chains(tmp_path):
    (tmp_path / "below").mkdir()
    first, second = tmp_path / "below" / "first.toml", tmp_path / "second.toml"
    first.write_text('extends = "finetune_dfew"\n[train]\nepochs = 7\nkeep_last = 9\n')
    second.write_text('extends = "below/first.toml"\n[train]\nepochs = 8\n[run]\nseed = 1\n')
    config = recipe.load(str(second), ["run.name=mine"])
    dfew = recipe.load("finetune_dfew")
    train = dfew.train.model_copy(update={"epochs": 8, "keep_last": 9})
    run = dfew.run.model_copy(update={"seed": 1, "name": "mine"})
    assert config == dfew.model_copy(update={"train": train, "run": run})


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ('"mine.toml"', r"in a cycle.*mine\.toml -> .*mine\.toml"),
        ('"none.toml"', r"extends in .*mine\.toml.*none\.toml: No such file"),
        ('"finetune_dfw"', r"No such recipe.*mine\.toml.*did you mean finetune_dfew"),
        ("3", r"extends in .*mine\.toml"),
    ],
)
def test_what_cannot_be_extended_is_an_error(extends, message, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(f"extends = {extends}\n")
    with pytest.raises(ConfigError, match=message):
        recipe.load(str(path))


def test_a_new_row_of_a_table_is_a_new_value(monkeypatch):
    with pytest.raises(ConfigError, match="did you mean tube"):
        recipe.load("tiny_cpu", ["mask.kind=tubes"])
    monkeypatch.setitem(masking.MASKS, "tubes", masking.MASKS["tube"])
    assert recipe.load("tiny_cpu", ["mask.kind=tubes"]).mask.kind == "tubes"


def test_paper_recipe_is_the_released_codes():
    """The paper's numbers: no other test would find a slip in the recipe."""
    config = recipe.load("svfap_base_voxceleb2")
    assert (config.data.num_frames, config.data.sampling_rate, config.data.frame_size) == (
        16,
        4,
        160,
    )
    assert config.window == 61
    assert config.mask.ratio == 0.9
    optim = config.optim
    assert (optim.lr, optim.min_lr, optim.warmup_lr) == (3e-4, 1e-5, 1e-6)
    assert (optim.betas, optim.weight_decay, optim.clip_grad_norm) == ((0.9, 0.95), 0.05, 0.0)
    assert optim.warmup_fraction * config.train.epochs == pytest.approx(5)
    assert (config.train.global_batch_size, config.train.epochs) == (256, 100)


def test_resolved_recipe_reads_back_as_itself():
    config = recipe.load(
        "tiny_cpu",
        [
            "data.url=s3://b/x",
            "model.stage_depths=[3,2,2]",
            "model.num_bottleneck_tokens=[4,2]",
            "model.pyramid=false",
            "run.seed=7",
        ],
    )
    again = recipe.from_tables(tomllib.loads(recipe.dumps(config)), where="dumped")
    assert again == config
    assert again.fingerprint == config.fingerprint


@pytest.mark.parametrize(
    ("override", "key", "advice"),
    [
        ("train.max_step=3", "train.max_step", "did you mean max_steps?"),
        ("trian.max_steps=3", "trian", "did you mean train?"),
        ('train.max_steps="3"', "train.max_steps", "integer"),
        ("optim.lr=-1", "optim.lr", "greater than 0"),
        ("data.crop_scales=[1.0,2.0]", "data.crop_scales.1", "less than or equal to 1"),
        ("model.size=giant", "model.size", "nano, tiny, small, base, large"),
        ("train.global_batch_size=6", "train.global_batch_size", "data.num_lanes"),
        ("train.micro_batch_size=3", "train.micro_batch_size", "divides 4"),
        ("cluster.num_workers=3", "cluster.num_workers", "1, 2, 4"),
        ("cluster.min_workers=3", "cluster.min_workers", "cluster.num_workers = 2"),
        ("data.frame_size=100", "data.frame_size", "model.patch_size"),
        ("data.num_frames=15", "data.num_frames", "model.tubelet_size"),
        ("mask.ratio=0.999", "mask.ratio", "mask.ratio"),
        ("model.num_bottleneck_tokens=[8,0]", "model.num_bottleneck_tokens", "one per stage"),
        ("model.encoder=vitt", "model.encoder", "did you mean vit?"),
        ("data.repeated_sampling=3", "train.global_batch_size", "data.repeated_sampling = 3"),
        ("optim.betas=0.9", "optim.betas", "'optim.betas=[1, 2]'"),
        ("train", "train", "section.key=value"),
    ],
)
def test_wrong_override_is_one_error_with_key_value_and_remedy(override, key, advice):
    with pytest.raises(ConfigError) as caught:
        recipe.load("tiny_cpu", [override])
    assert key in str(caught.value)
    assert advice in str(caught.value)
    assert override.partition("=")[2].strip('"[]').split(",")[-1] in caught.value.found
    assert caught.value.do


def test_bf16_without_zero_is_refused():
    with pytest.raises(ConfigError, match="zero_stage"):
        recipe.load("tiny_cpu", ["train.zero_stage=0", "train.dtype=bfloat16"])


def test_probes_are_of_pre_training():
    with pytest.raises(ConfigError, match=r"probe.url.*\[task\]"):
        recipe.load("finetune_dfew", ["probe.url=labeled"])


def test_probes_come_with_checkpoints_unless_they_have_a_period():
    assert recipe.load("tiny_cpu").probe_every == 0
    config = recipe.load("tiny_cpu", ["probe.url=labeled"])
    assert config.probe_every == config.train.checkpoint_every
    assert recipe.load("tiny_cpu", ["probe.url=labeled", "probe.every=7"]).probe_every == 7


def test_held_out_clips_are_of_pre_training():
    with pytest.raises(ConfigError, match=r"data.eval_url.*\[task\]"):
        recipe.load("finetune_dfew", ["data.eval_url=held-out"])


def test_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean tiny_cpu"):
        recipe.load("tiny_cp")


def test_recipe_file_errors_name_the_file(tmp_path):
    path = tmp_path / "broken.toml"
    with pytest.raises(ConfigError, match="No such file"):
        recipe.load(str(path))
    path.write_text("[train\nmax_steps = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml.*line 1"):
        recipe.load(str(path))


@pytest.mark.parametrize(
    ("encoding", "message"),
    [
        ("latin-1", "line 1 has the byte 0xe9, which is not UTF-8 ('é' in Latin-1)"),
        ("utf-16", "it is UTF-16, not UTF-8"),
        ("utf-16-le", "it has NUL characters"),
        ("utf-32", "it is UTF-32"),
    ],
)
def test_a_recipe_of_another_encoding_is_named(encoding, message, tmp_path):
    """PowerShell's `>` writes UTF-16."""
    path = tmp_path / "mine.toml"
    text = "# méthode\nextends = 'tiny_cpu'\n[train]\nmax_steps = 3\n"
    path.write_bytes((text.replace("é", "e") if encoding == "utf-16-le" else text).encode(encoding))
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        recipe.load(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.do == "save the file as UTF-8"


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_bytes("extends = 'tiny_cpu'\r\n[train]\r\nmax_steps = 3\r\n".encode("utf-8-sig"))
    assert recipe.load(str(path)).train.max_steps == 3


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (2, 1), (4, 1)])
def test_accumulation_makes_up_for_fewer_ranks(ranks, accumulation):
    assert check_world_size(recipe.load("tiny_cpu"), ranks) == accumulation


def test_window_longer_than_the_shortest_video_is_refused():
    data = Config().data
    check_window(data, 61, "shards")
    with pytest.raises(
        ConfigError, match=r"spans 61 frames, the shortest video has 60.*--min-frames 61"
    ):
        check_window(data, 60, "shards")


# What two attempts at one run may differ in. Any other field, and each new one that is not put
# here, decides the numbers, and a run with another value of it is another run.
FREE = {
    "run": {"name", "url", "ledger", "allow_change"},
    "data": {
        "url",
        "eval_url",
        "kind",
        "max_bad_fraction",
        "decode_workers",
        "feeders",
        "decode_seconds",
        "decode_threads",
        "prefetch_bytes",
        "read_ahead_bytes",
        "cache_dir",
        "cache_bytes",
    },
    "decode": {"backend", "pipelines"},
    "train": {
        "max_seconds",
        "micro_batch_size",
        "zero_stage",
        "compile",
        "compile_mode",
        "activation_checkpointing",
        "log_every",
        "eval_every",
        "checkpoint_every",
        "keep_last",
        "keep_every",
        "threads_per_rank",
        "collective_timeout_seconds",
        "stall_seconds",
    },
    "task": {"metrics", "published", "published_source", "reproduced", "reproduced_source"},
    "finetune": {"init", "seeds", "test_segments", "test_crops"},
    "track": set(TrackConfig.model_fields),
    "profile": {"steps"},
    "cluster": {
        "bind_cpus",
        "num_workers",
        "min_workers",
        "resize_seconds",
        "use_gpu",
        "cpus_per_worker",
        "max_failures",
        "wait_seconds",
        "standby",
    },
    "health": {
        *("max_skipped", "max_rollbacks", "spike_zscore", "spike_window", "spike_action"),
    },
    "probe": {
        *("url", "every", "label", "max_clips", "region", "neighbors"),
        *("pool", "grid", "stages"),
    },
    "metrics": {"enabled", "host", "port", "discovery_port", "linger_seconds"},
}
TASK = TaskConfig(
    kind="classification", set="dfew", label="class", names=("sad", "happy"), metrics=("uar",)
)
FIELDS = [
    (section, name) for section, part in Config(task=TASK) for name in type(part).model_fields
]


def another(value, choices: tuple):
    """A value of the same kind that is not this one."""
    if choices:
        return next(choice for choice in choices if choice != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, tuple):
        return (*value[:-1], another(value[-1], ())) if value else (1.0,)
    return 3 if value is None else value + 1


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_fingerprint_minds_every_field_but_those_that_are_free(section, name):
    config = recipe.load("tiny_cpu", ["model.stage_depths=[2,1,1]"]).model_copy(
        update={"task": TASK}
    )
    part = getattr(config, section)
    annotation = type(part).model_fields[name].annotation
    choices = get_args(annotation) if get_origin(annotation) is Literal else ()
    tuples = {"stage_depths": (3, 1, 1), "sources": (SourceConfig(url="shards"),)}
    value = tuples.get(name) or another(getattr(part, name), choices)
    # Copied without validation: which values go together is not the fingerprint's matter.
    other = config.model_copy(update={section: part.model_copy(update={name: value})})
    assert other != config
    assert (other.fingerprint == config.fingerprint) == (name in FREE.get(section, ()))


@pytest.mark.parametrize(
    ("least", "most", "lanes", "batch", "micro", "sizes"),
    [
        (0, 2, 4, 8, 4, (2,)),  # not elastic
        (2, 2, 4, 8, 4, (2,)),
        (1, 4, 4, 8, 4, (1, 2, 4)),
        (1, 3, 8, 8, 4, (1, 2)),  # the lanes cannot be shared by 3
        (2, 3, 6, 12, 2, (2, 3)),
        (3, 7, 8, 8, 4, (4,)),
        (1, 8, 8, 32, 8, (1, 2, 4, 8)),
        (1, 8, 8, 24, 6, (1, 2, 4, 8)),
        (1, 6, 6, 12, 4, (1, 3, 6)),  # 2 ranks of 6 clips each cannot step by 4
    ],
)
def test_a_group_may_have_the_sizes_that_share_lanes_and_batch(
    least, most, lanes, batch, micro, sizes
):
    overrides = [f"cluster.min_workers={least}", f"cluster.num_workers={most}"]
    overrides += [f"data.num_lanes={lanes}", f"train.global_batch_size={batch}"]
    config = recipe.load("tiny_cpu", [*overrides, f"train.micro_batch_size={micro}"])
    assert config.world_sizes == sizes


def test_a_group_without_a_possible_size_is_an_error():
    overrides = ["cluster.min_workers=5", "cluster.num_workers=7", "data.num_lanes=8"]
    with pytest.raises(ConfigError, match="1, 2, 4, 8"):
        recipe.load("tiny_cpu", overrides)


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_each_key_of_the_fingerprint_may_change_in_a_run_or_has_a_reason(section, name):
    key = f"{section}.{name}"
    fixed = bool(changes.why_fixed(key)) and key not in changes.CHANGEABLE
    if section in FREE and name in FREE[section]:
        assert key not in changes.CHANGEABLE
    else:
        assert fixed != (key in changes.CHANGEABLE)


@pytest.mark.parametrize("value", ["train.max_steps", '["train.max_steps"]'])
def test_keys_that_may_change_are_given_as_text_or_list(value):
    config = recipe.load("tiny_cpu", [f"run.allow_change={value}"])
    assert config.run.allow_change == ("train.max_steps",)
    assert recipe.from_tables(config.model_dump(mode="json"), where="test") == config
    two = recipe.load("tiny_cpu", ["run.allow_change=train.max_steps,optim.lr"])
    assert two.run.allow_change == ("train.max_steps", "optim.lr")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("train.max_step", r"Unknown key.*did you mean train\.max_steps"),
        ("data.num_lanes", r"data\.num_lanes: it decides the order of samples"),
        ("run.seed", "order of samples"),
        ("model.size", "decides the network"),
        ("mask.ratio", "what the network learns"),
    ],
)
def test_keys_that_no_run_changes_are_refused(key, message):
    with pytest.raises(ConfigError, match=message):
        recipe.load("tiny_cpu", [f"run.allow_change={key}"])


def test_fingerprint_of_pre_training_is_without_what_only_fine_tuning_reads():
    config = recipe.load("tiny_cpu")
    for change in ("finetune.drop_path=0.5", "augment.flip=0.0"):
        assert recipe.load("tiny_cpu", [change]).fingerprint == config.fingerprint


def test_where_augmentation_runs_is_of_the_fingerprint_but_not_of_older_runs():
    config = recipe.load("finetune_cremad")
    on_device = recipe.load("finetune_cremad", ["augment.run_on=device"])
    assert on_device.augments_on_device
    assert on_device.fingerprint != config.fingerprint
    tables = tomllib.loads(recipe.dumps(config))
    tables["augment"].pop("run_on")  # as stored before there was the key
    assert recipe.from_stored(tables, where="config.toml").fingerprint == config.fingerprint
    assert not recipe.load("tiny_cpu", ["augment.run_on=device"]).augments_on_device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ("pcc",)}, "pcc is not a metric of a classification: use one of uar"),
        ({"published": (1.0, 2.0)}, "published"),
        ({"published": (1.0,), "reproduced": (1.0, 2.0)}, "reproduced"),
        ({"label": ""}, "give label, or kind = auto"),
        ({"names": ()}, "give names, or kind = auto"),
        ({"metrics": ()}, "give metrics, or kind = auto"),
        ({"folds_by": "subject"}, "at least 2 to be made by subject"),
        ({"names": ("sad", "sad")}, "all be different"),
        ({"names": ("sad",)}, "at least two classes"),
        ({"fold": 2, "folds": 1}, "fold must be one of the 1 folds"),
    ],
)
def test_impossible_tasks_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        recipe.from_tables({"task": {**TASK.model_dump(), **change}}, where="test")


def test_a_recipe_with_a_task_survives_writing_and_reading(tmp_path):
    config = Config(task=TASK)
    path = tmp_path / "recipe.toml"
    path.write_text(recipe.dumps(config))
    assert recipe.load(str(path)) == config
    with pytest.raises(ConfigError, match="did you mean label"):
        recipe.load(str(path), ["task.labl=class"])


def test_every_free_field_exists():
    assert {(section, name) for section in FREE for name in FREE[section]} < set(FIELDS)


def test_values_that_do_not_go_together_are_not_all_listed():
    with pytest.raises(
        ConfigError, match=r"task in .* fit each other.*Do: fold must be one of the 5"
    ):
        recipe.load("finetune_synthetic", ["task.fold=7"])
