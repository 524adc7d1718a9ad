from __future__ import annotations

from typing import Any

import pytest

from svfap_dist.checkpoint.store import TrainState
from svfap_dist.config import Config, recipe
from svfap_dist.errors import CheckpointError, ConfigError


def a_config(**sections: dict[str, Any]) -> Config:
    return recipe.from_tables(sections, where="test")


def a_state(config: Config, manifest: str = "m1") -> TrainState:
    return TrainState.of_run(config, 25, steps_per_epoch=10, fingerprint=manifest, world_size=2)


def test_json_round_trip() -> None:
    state = a_state(a_config())
    assert TrainState.from_json(state.to_json(), where="x") == state
    assert (state.epoch, state.clips_seen) == (2, 25 * 256)
    with pytest.raises(CheckpointError):
        TrainState.from_json(b'{"step": 3}', where="x")
    with pytest.raises(CheckpointError):
        TrainState.from_json(b"{", where="x")


def test_the_same_recipe_and_data_resume() -> None:
    config = a_config(model={"stage_depths": [2, 2]})
    a_state(config).check_resumable(config, "m1", where="here")


def test_what_changes_no_number_may_change() -> None:
    before = a_config(train={"zero_stage": 1, "micro_batch_size": 64})
    after = a_config(
        train={"zero_stage": 2, "micro_batch_size": 32, "log_every": 3},
        cluster={"num_workers": 4},
        run={"name": "other"},
    )
    a_state(before).check_resumable(after, "m1", where="here")


def test_a_run_keeps_the_order_of_samples_that_it_began_with() -> None:
    first = a_state(a_config(data={"order_version": 1}))
    del first.config["data"]["order_version"]  # as stored before there was the key
    now = a_config()
    assert now.data.order_version == 2
    first.check_resumable(now, "m1", where="here")
    assert first.with_order(now).data.order_version == 1
    assert first.with_order(now).fingerprint == first.config_fingerprint != now.fingerprint
    assert a_state(now).with_order(now) == now
    with pytest.raises(ConfigError) as caught:
        first.check_resumable(a_config(optim={"lr": 1e-3}), "m1", where="here")
    assert "order_version" not in caught.value.found


def test_other_data_is_refused() -> None:
    config = a_config()
    with pytest.raises(ConfigError, match=r"other data.*m2.*m1"):
        a_state(config).check_resumable(config, "m2", where="here")


def test_another_recipe_is_refused_by_the_keys_that_matter() -> None:
    before, after = a_config(), a_config(optim={"lr": 1e-3}, train={"epochs": 7, "log_every": 3})
    with pytest.raises(ConfigError) as caught:
        a_state(before).check_resumable(after, "m1", where="here")
    assert "optim.lr is 0.001, was 0.0003" in caught.value.found
    assert "train.epochs is 7, was 100" in caught.value.found
    assert "log_every" not in caught.value.found


def test_keys_of_the_future_may_change_where_the_recipe_names_them() -> None:
    state = a_state(a_config(train={"max_steps": 30}))
    new = {"train": {"max_steps": 50}, "optim": {"lr": 1e-3}}
    with pytest.raises(ConfigError) as caught:
        state.check_resumable(a_config(**new), "m1", where="here")
    assert "run.allow_change=optim.lr,train.max_steps" in caught.value.do
    one = a_config(**new, run={"allow_change": ["train.max_steps"]})
    with pytest.raises(ConfigError) as caught:
        state.check_resumable(one, "m1", where="here")
    assert "optim.lr is 0.001" in caught.value.found
    assert "max_steps" not in caught.value.found
    assert "run.allow_change=optim.lr continues" in caught.value.do
    both = a_config(**new, run={"allow_change": "train.max_steps, optim.lr"})
    state.check_resumable(both, "m1", where="here")
    changes = [(change.key, change.before, change.now) for change in state.changes(both)]
    assert changes == [("optim.lr", 3e-4, 1e-3), ("train.max_steps", 30, 50)]
    assert a_state(both).config_fingerprint == both.fingerprint != state.config_fingerprint
    assert not a_state(both).changes(both)


def test_what_fixes_the_order_is_refused_without_that_advice() -> None:
    state, other = a_state(a_config()), a_config(data={"num_lanes": 16}, optim={"lr": 1e-3})
    with pytest.raises(ConfigError, match=r"data\.num_lanes is 16") as caught:
        state.check_resumable(other, "m1", where="here")
    assert "allow_change" not in caught.value.do


def test_a_task_is_another_recipe() -> None:
    task = recipe.load("finetune_dfew")
    none = task.model_copy(update={"task": None})
    for before, after in ((none, task), (task, none)):
        with pytest.raises(ConfigError, match=r"\[task\] is"):
            a_state(before).check_resumable(after, "m1", where="here")


@pytest.mark.parametrize(("saved", "wanted"), [(0, 2), (2, 0), (3, 2), (1, 3)])
def test_any_zero_stage_resumes(saved: int, wanted: int) -> None:
    before, after = (a_config(train={"zero_stage": stage}) for stage in (saved, wanted))
    a_state(before).check_resumable(after, "m1", where="here")
