"""Recipes of mixtures: [[data.sources]], what is refused, and one source as before."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from svfap_dist.config import Config, recipe, require_urls
from svfap_dist.errors import ConfigError

THREE = """extends = "tiny_cpu"
[[data.sources]]
url = "s3://bucket/vox"
weight = 3
[[data.sources]]
url = "celeb/train/"
region = "full"
[[data.sources]]
url = "other/train"
weight = 0.5
name = "other"
"""


def load(tmp_path: Path, text: str = THREE) -> Config:
    path = tmp_path / "mixture.toml"
    path.write_text(text)
    return recipe.load(str(path))


def test_sources_have_defaults_and_names(tmp_path: Path) -> None:
    vox, celeb, other = load(tmp_path).data.sources
    assert [vox.label, celeb.label, other.label] == ["vox", "train", "other"]
    assert [vox.weight, celeb.weight, other.weight] == [3, 1, 0.5]
    assert [vox.region, celeb.region] == [None, "full"]


def test_a_resolved_mixture_is_read_back_as_it_was(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert recipe.from_tables(tomllib.loads(recipe.dumps(config)), where="config.toml") == config
    assert recipe.from_stored(config.model_dump(mode="json"), where="state.json") == config
    require_urls(config, "data.url")


def test_sources_can_be_given_as_an_override() -> None:
    config = recipe.load("tiny_cpu", ['data.sources=[{url="a", weight=2}, {url="b"}]'])
    assert [source.weight for source in config.data.sources] == [2, 1]


def test_one_source_is_the_run_of_its_url() -> None:
    plain = recipe.load("tiny_cpu", ["data.url=a", "data.region=full", "data.kind=images"])
    source = '{url="a", weight=7, region="full", kind="images"}'
    one = recipe.load("tiny_cpu", [f"data.sources=[{source}]"])
    assert one == plain
    assert one.fingerprint == plain.fingerprint
    assert one.fingerprint == recipe.load("tiny_cpu", ["data.region=full"]).fingerprint


def test_the_fingerprint_has_weights_regions_and_their_order_but_no_places() -> None:
    def fingerprint(*sources: str) -> str:
        return recipe.load("tiny_cpu", [f"data.sources=[{', '.join(sources)}]"]).fingerprint

    first = fingerprint('{url="a", weight=2}', '{url="b"}')
    assert fingerprint('{url="c", weight=2.0, name="x"}', '{url="d"}') == first
    assert fingerprint('{url="a", weight=3}', '{url="b"}') != first
    assert fingerprint('{url="a", weight=2}', '{url="b", region="full"}') != first
    assert fingerprint('{url="b"}', '{url="a", weight=2}') != first


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ('{url="a", weight=0}, {url="b"}', r"data.sources.0.weight.*Found: 0.*greater than 0"),
        ('{url="a"}, {url="b", weight=-1.5}', r"data.sources.1.weight.*Found: -1.5.*greater"),
        ('{url="a"}, {weight=1}', r"Missing.*data.sources.1.url.*give it"),
        ('{url="a"}, {url="b", wieght=1}', r"Unknown key.*wieght.*did you mean weight"),
        ('{url="a"}, {url="./a/"}', r"same URL.*entries 1 and 2.*Found: .*Do: give each .*once"),
        ('{url="x/train"}, {url="y/train"}', r"same name.*'train'.*give each .*`name`"),
        ('{url="a"}, {url="b", weight=1e-5}', r"too small.*entry 2.*1e-05.*at least 0.0001"),
        ('{url="a", region="nose"}, {url="b"}', r"data.sources.0.region.*nose"),
    ],
)
def test_what_cannot_be_mixed_is_refused(sources: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe.load("tiny_cpu", [f"data.sources=[{sources}]"])


def test_a_url_and_sources_are_refused() -> None:
    overrides = ["data.url=a", 'data.sources=[{url="b"}, {url="c"}]']
    found = r"Both data.url and data.sources.*data.url = 'a' and 2 entries.*mixture"
    with pytest.raises(ConfigError, match=found):
        recipe.load("tiny_cpu", overrides)


def test_all_clips_of_a_task_have_one_region() -> None:
    with pytest.raises(ConfigError, match=r"another region.*entry 2.*full, where data.region"):
        recipe.load("finetune_dfew", ['data.sources=[{url="a"}, {url="b", region="full"}]'])


def test_a_run_keeps_its_sources() -> None:
    with pytest.raises(ConfigError, match=r"data.sources: it decides the order of samples"):
        recipe.load("tiny_cpu", ["run.allow_change=data.sources"])
