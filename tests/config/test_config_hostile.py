"""Recipes of any content: a valid `Config` that survives writing and reading, or our own error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import value_or_our_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svfap_dist.config import Config, recipe
from svfap_dist.errors import ConfigError

# TOML's values, and words that are none.
VALUES = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.booleans().map(lambda value: str(value).lower()),
    st.text(max_size=8).map(json.dumps),
    st.lists(st.integers() | st.floats(allow_nan=False, allow_infinity=False), max_size=3).map(str),
    st.sampled_from(["{}", "{a = 1}", "[[1], ['x']]", "1979-05-27", "07:32:00", "tube", "'nano'",
                     "1e400", "-0.0", "9" * 5000, "[" * 2000, '"s3://a:b@c"', "'\\ud800'", ""]),
)  # fmt: skip
SECTIONS = {
    name: list(type(getattr(Config(), name)).model_fields)
    for name in Config.model_fields
    if getattr(Config(), name) is not None
}
SECTIONS["task"] = ["kind", "set", "label", "names", "metrics", "fold", "published"]
LINES = st.sampled_from(sorted(SECTIONS)).flatmap(
    lambda section: st.tuples(
        st.just(section), st.sampled_from([*SECTIONS[section], "other"]), VALUES
    )
)
TEXTS = st.one_of(
    st.binary(max_size=30),
    st.text(max_size=30).map(str.encode),
    st.sampled_from([b"a" + b".a" * 5000 + b"=1", b"a=" + b"[" * 50_000, b"[run]\nurl=1\n[run]"]),
    VALUES.map(lambda value: f"extends = {value}".encode()),
    st.lists(LINES, max_size=4).map(
        lambda lines: "".join(f"[{s}]\n{key} = {value}\n" for s, key, value in lines).encode()
    ),
)


LONG = [pytest.mark.slow, pytest.mark.timeout(900)]


def check(load) -> None:
    if (config := value_or_our_error(load, ConfigError)) is not None:
        assert isinstance(config, Config)
        assert isinstance(config.fingerprint, str)


def fuzz(folder: Path, examples: int) -> None:
    path = folder / "mine.toml"

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck), database=None)
    @given(TEXTS | st.lists(LINES, min_size=1, max_size=2))
    def run(given):
        if isinstance(given, bytes):
            path.write_bytes(given)
            check(lambda: recipe.load(str(path)))
        else:
            words = [f"{section}.{key}={value}" for section, key, value in given]
            check(lambda: recipe.load("tiny_cpu", words))

    run()


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=LONG)])
def test_any_recipe_is_valid_or_our_error(examples: int, tmp_path: Path) -> None:
    fuzz(tmp_path, examples)
