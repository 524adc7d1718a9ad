"""The documents of the repository: valid, in step with the code, without broken links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest
import yaml

from svfap_dist.config import Config
from svfap_dist.config.sections import Section

_ROOT = Path(__file__).resolve().parents[2]
_NOTEBOOKS = sorted((_ROOT / "docs/tutorials").glob("*.ipynb"))
_DOCUMENTS = sorted(
    path
    for folder in (".", "docs", "docs/benchmarks", "launch", "monitoring")
    for path in (_ROOT / folder).glob("*.md")
)


_COMMIT = re.compile(r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7}\b")  # not a number, nor a word


def _git(*words: str) -> str:
    command = ["git", "-c", f"safe.directory={_ROOT}", "-C", _ROOT, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _history() -> set[str] | None:
    """The commits of the checkout, by their first seven digits; None for one without history."""
    if shutil.which("git") is None or not (_ROOT / ".git").exists():
        return None
    if _git("rev-parse", "--is-shallow-repository") == "true":
        return None
    return {commit[:7] for commit in _git("rev-list", "HEAD").split()}


def _load(name: str):
    return yaml.safe_load((_ROOT / name).read_text())


def test_the_workflow_runs_what_ci_runs():
    targets = re.findall(r"^make (\S+)$", (_ROOT / ".ci/run").read_text(), re.MULTILINE)
    job = _load(".github/workflows/ci.yml")["jobs"]["make"]
    assert job["strategy"]["matrix"]["target"] == targets
    assert job["steps"][-1] == {"run": "make ${{ matrix.target }}"}


def test_images_are_built_for_each_change_and_pins_audited_each_week():
    images = _load(".github/workflows/ci.yml")["jobs"]["images"]
    assert images["steps"][-1] == {"run": "make images"}
    audit = _load(".github/workflows/audit.yml")
    assert audit[True]["schedule"]  # in YAML 1.1 the key "on" is a truth value
    assert audit["jobs"]["audit"]["steps"][-1] == {"run": "make audit"}
    targets = re.findall(r"^([a-z-]+):", (_ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"images", "audit"} <= set(targets)


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issue_forms_have_what_github_requires(name: str):
    form = _load(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    ids = [part["id"] for part in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(part["attributes"]["label"] for part in form["body"])


def test_citation_and_changelog_name_the_version():
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text())["project"]
    citation = _load("CITATION.cff")
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    released = f"## [{project['version']}] - {citation['date-released']}"
    assert released in (_ROOT / "CHANGELOG.md").read_text().splitlines()


@pytest.mark.parametrize(
    "path", [*_DOCUMENTS, *_NOTEBOOKS], ids=lambda path: str(path.relative_to(_ROOT))
)
def test_links_lead_somewhere(path: Path):
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


def test_the_site_builds_without_a_broken_link(tmp_path: Path):
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", tmp_path / "site"],
        cwd=_ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    pages = {page.stem for page in (tmp_path / "site").glob("*.html")}
    assert pages >= {path.stem for path in (_ROOT / "docs").glob("*.md")} | {"index", "launching"}
    assert "svfap_dist.inference.load.load" in (tmp_path / "site/reference.html").read_text()
    tutorials = tmp_path / "site/tutorials"
    assert {page.stem for page in tutorials.glob("*.html")} == {path.stem for path in _NOTEBOOKS}
    # A stored picture, and a link from a page in a folder to one outside.
    shards = (tutorials / "shards.html").read_text()
    assert set(re.findall(r'<img[^>]* src="([^"]+)"', shards)) >= {
        path.name for path in tutorials.glob("shards_*.jpg")
    }
    assert 'href="../datasets.html"' in shards
    assert 'href="tutorials/shards.html"' in (tmp_path / "site/index.html").read_text()


def test_documents_override_only_keys_that_exist():
    fields = {
        name: set(section.model_fields)
        for name, field in Config.model_fields.items()
        for section in (field.annotation, *get_args(field.annotation))
        if isinstance(section, type) and issubclass(section, Section)
    }
    override = re.compile(rf"(?<![\w./-])({'|'.join(fields)})\.(\w+)=")
    unknown = [
        f"{path.name}: {section}.{name}"
        for path in (*_DOCUMENTS, *_NOTEBOOKS, *(_ROOT / "launch/recipes").glob("*.toml"))
        for section, name in override.findall(path.read_text())
        if name not in fields[section]
    ]
    assert unknown == []


def test_each_page_of_measurements_names_its_command_and_commits_of_the_history():
    pages = {path.name: path.read_text() for path in (_ROOT / "docs/benchmarks").glob("*.md")}
    named = re.compile(r"`(?:svfap|python|pytest|make) [^`]+`|No command of the repository")
    assert [page for page, text in pages.items() if not named.search(text)] == []
    overview = (_ROOT / "docs/benchmarks.md").read_text()
    linked = set(re.findall(r"^\| \[[^]]+\]\(benchmarks/([\w-]+\.md)\)", overview, re.MULTILINE))
    assert linked == pages.keys()
    commits = {page: set(_COMMIT.findall(text)) for page, text in pages.items()}
    assert [page for page, found in commits.items() if not found] == []
    history = _history()
    if history is not None:
        assert set.union(*commits.values(), _COMMIT.findall(overview)) - history == set()


def test_packages_are_marked_as_typed():
    for package in ("svfap_dist", "data_sharding"):
        assert (_ROOT / package / "py.typed").read_bytes() == b""
