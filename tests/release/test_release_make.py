"""What `make release` refuses and writes, and what is in an sdist."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import subprocess
import tarfile
import tomllib
from email.parser import Parser
from pathlib import Path

import make_release
import pytest
import yaml
from hatchling.build import build_sdist
from packaging.version import Version
from wheel_environment import ROOT

DATE = "2031-02-03"

# A release is made in a Git checkout only; the tests of the library need neither.
needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs Git, as a release does")
needs_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a Git checkout")


def git(root: Path, *words: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *author, "-C", root, *words], check=True, capture_output=True)


def next_version() -> str:
    return f"{Version(project()['version']).major + 1}.0.0"


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture
def checkout(tmp_path):
    """A repository with the files that a release changes, as they are here."""
    if shutil.which("git") is None:
        pytest.skip("needs Git, as a release does")
    for name in make_release.CHANGED:
        shutil.copy(ROOT / name, tmp_path)
    changelog = tmp_path / "CHANGELOG.md"  # right after a release nothing is unreleased
    changelog.write_text(
        changelog.read_text().replace("## [Unreleased]\n", "## [Unreleased]\n\n- A change.\n")
    )
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "all")
    return tmp_path


def test_a_new_version_of_a_clean_checkout_may_be_released(checkout):
    make_release.check(checkout, next_version())


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("", "make release VERSION=0.2.0"),
        ("two", "'two' is not a version"),
        ("01.0", "is written '1.0'"),
        ("0.0.1", "not newer than"),
        (project()["version"], "CHANGELOG.md has"),
    ],
)
def test_other_versions_are_refused(checkout, version, words):
    with pytest.raises(make_release.ReleaseError, match=words):
        make_release.check(checkout, version)


def test_a_tagged_version_is_refused(checkout):
    git(checkout, "tag", f"v{next_version()}")
    with pytest.raises(make_release.ReleaseError, match=r"Tag v.* exists"):
        make_release.check(checkout, next_version())


def test_uncommitted_changes_are_refused_and_listed(checkout):
    (checkout / "new.py").write_text("")
    with pytest.raises(make_release.ReleaseError, match=r"has changes(.|\n)*new\.py"):
        make_release.check(checkout, next_version())


def test_a_release_without_changes_is_refused(checkout):
    (checkout / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - 2026-11-23\n"
    )
    git(checkout, "commit", "--quiet", "-a", "-m", "empty")
    with pytest.raises(make_release.ReleaseError, match="nothing under"):
        make_release.check(checkout, next_version())


def test_version_and_date_are_written_everywhere_and_only_once(checkout):
    before = (checkout / "CHANGELOG.md").read_text()
    make_release.write_version(checkout, next_version(), DATE)
    written = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]
    assert written == {**project(), "version": next_version()}
    citation = yaml.safe_load((checkout / "CITATION.cff").read_text())
    assert citation["version"] == next_version()
    assert citation["date-released"] == datetime.date.fromisoformat(DATE)
    heading = f"## [Unreleased]\n\n## [{next_version()}] - {DATE}\n"
    assert (checkout / "CHANGELOG.md").read_text() == before.replace("## [Unreleased]\n", heading)
    git(checkout, "commit", "--quiet", "-a", "-m", "release")
    with pytest.raises(make_release.ReleaseError, match="already"):
        make_release.check(checkout, next_version())


def test_the_copy_has_what_is_committed_only(checkout, tmp_path):
    (checkout / "junk").write_text("")
    make_release._copy_head(checkout, tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == set(make_release.CHANGED)


def test_checksums_are_those_of_sha256sum(tmp_path):
    (tmp_path / "a.whl").write_bytes(b"a")
    make_release.write_checksums(tmp_path)
    digest = hashlib.sha256(b"a").hexdigest()
    assert (tmp_path / "SHA256SUMS").read_text() == f"{digest}  a.whl\n"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Names of the files of an sdist, and its metadata."""
    folder = tmp_path_factory.mktemp("sdist")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build_sdist(str(folder))
    with tarfile.open(folder / name) as tar:
        names = {member.name.partition("/")[2] for member in tar.getmembers()}
        text = tar.extractfile(f"{name.removesuffix('.tar.gz')}/PKG-INFO").read().decode()
    return names, Parser().parsestr(text)


@needs_git
@needs_checkout
def test_an_sdist_has_all_files_of_the_repository_and_no_others(sdist):
    # New files of this checkout may be in it, but its stray ones need not.
    tracked, untracked = files_of_checkout("--cached"), files_of_checkout("--others")
    assert tracked <= sdist[0]
    assert sdist[0] <= tracked | untracked | {"PKG-INFO"}


def files_of_checkout(kind: str) -> set[str]:
    # A container's user need not be the owner of the checkout.
    command = ["git", "-c", f"safe.directory={ROOT}", "-C", ROOT, "ls-files", "--exclude-standard"]
    listed = subprocess.run([*command, kind], check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


def test_metadata_is_complete_and_its_links_work_without_a_checkout(sdist):
    metadata = sdist[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata.get_all("Project-URL")
    readme = metadata.get_payload()
    assert "docs/use.md" in readme  # as text
    assert "](" in readme
    assert "![" not in readme
    targets = [part.partition(")")[0] for part in readme.split("](")[1:]]
    assert [target for target in targets if not target.startswith("https://")] == []
