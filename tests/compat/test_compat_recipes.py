"""Recipes and overrides with the key names of f84d50d still work."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from alike import differences

# Renamed keys and values: the old name works, and the warning contains both names. The old names
# stay in recipes/ and in COMMANDS.
RENAMED = {"data.colours": "data.colors", '"centre"': '"center"'}

RUNS = {"every key": "every_key", "every finetune key": "every_finetune_key/fold-1"}
RUNS |= {"old overrides": "old-keys"}


@pytest.mark.parametrize("name", RUNS)
def test_old_names_train_the_same_step(
    name: str, now: dict[str, Any], then: dict[str, Any]
) -> None:
    assert now["commands"][name]["code"] == 0, now["stderr"][name]
    assert differences(now["commands"][name], then["commands"][name]) == []
    assert differences(now["runs"][RUNS[name]], then["runs"][RUNS[name]]) == []


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_name_gives_a_warning(old: str, now: dict[str, Any]) -> None:
    for name in ("every key", "old overrides"):
        assert old in now["stderr"][name]
        assert RENAMED[old] in now["stderr"][name]


@pytest.mark.parametrize("name", ["shard train", "predict import", "export import"])
def test_an_old_region_as_an_option_gives_a_warning(name: str, now: dict[str, Any]) -> None:
    assert "region centre is now called center" in now["stderr"][name]


def test_the_old_recipes_have_every_key_of_their_version(old_files: Path) -> None:
    """A run's config.toml has every key except those that model.size decides."""
    whole = {**_keys("recipes/every_key.toml", old_files)}
    for section, keys in _keys("recipes/every_finetune_key.toml", old_files).items():
        whole[section] = whole.get(section, set()) | keys
    for run in ("runs/pretrain", "runs/finetune/fold-1"):
        for section, keys in _keys(f"{run}/config.toml", old_files).items():
            assert keys <= whole[section]


def _keys(path: str, folder: Path) -> dict[str, set[str]]:
    tables = tomllib.loads((folder / path).read_text())
    return {section: set(table) for section, table in tables.items()}
