"""The container files of launch/docker, read; `make images` builds one, with Docker."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILES = sorted((ROOT / "launch/docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
every_file = pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)


def instructions(path: Path) -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments(path: Path, name: str) -> list[str]:
    return [text for instruction, text in instructions(path) if instruction == name]


def copied(path: Path) -> set[str]:
    """Sources that come from the checkout."""
    copies = [text.split() for text in arguments(path, "COPY") if not text.startswith("--from=")]
    return {source for words in copies for source in words[:-1]}


def test_there_is_one_for_each_role():
    assert [path.stem for path in DOCKERFILES] == ["shard", "train"]


@every_file
def test_copied_files_exist_and_are_not_ignored(path):
    ignored, *allowed = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"
    ]
    assert ignored == "*"
    for source in copied(path):
        assert (ROOT / source).exists()
        assert f"!{source}" in allowed


@every_file
def test_what_the_wheel_is_built_from_is_copied(path):
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied(path) >= {
        *("pyproject.toml", "constraints.txt", "README.md"),
        *PROJECT["project"]["license-files"],
        *targets["packages"],
        *targets["force-include"],
    }


@every_file
def test_extras_exist(path):
    (extras,) = [text.removeprefix("EXTRAS=") for text in arguments(path, "ARG")]
    assert set(extras.split(",")) <= PROJECT["project"]["optional-dependencies"].keys()
    assert '".[${EXTRAS}]"' in path.read_text()


@every_file
def test_versions_of_base_and_torch_are_pinned_as_elsewhere(path):
    builder, final = arguments(path, "FROM")
    assert builder == f"{final} AS builder"
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", final)
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert re.findall(r"torch==[\d.]+", path.read_text()) == [torch[0]]


@every_file
def test_the_program_runs_as_a_user_without_rights(path):
    names = [name for name, _ in instructions(path)]
    assert arguments(path, "USER") == ["1000"]  # a number: Kubernetes' runAsNonRoot reads it
    assert any(
        text.startswith("useradd ") and "--uid 1000 " in text for text in arguments(path, "RUN")
    )
    assert "RUN" not in names[names.index("USER") :]
    assert arguments(path, "HEALTHCHECK") == ["NONE"]


def test_the_training_image_has_what_runs_may_ask_for():
    """Trackers and probes are keys of a recipe; the image has no `pip install` for its user."""
    (extras,) = arguments(ROOT / "launch/docker/train.Dockerfile", "ARG")
    wanted = {"train", "ray", "gpu", "probe", "report", "hub", "parquet", "track"}
    assert set(extras.removeprefix("EXTRAS=").split(",")) == wanted


def test_the_training_image_gets_the_decoding_units():
    """The container toolkit's default, compute and utility, leaves out NVDEC's library."""
    path = ROOT / "launch/docker/train.Dockerfile"
    variables = " ".join(arguments(path, "ENV"))
    capabilities = re.search(r"NVIDIA_DRIVER_CAPABILITIES=(\S+)", variables)[1]
    assert {"compute", "video", "utility"} <= set(capabilities.split(","))
