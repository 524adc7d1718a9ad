"""Build and test the packages of a version: `make release VERSION=0.2.0`.

This works on a copy of HEAD: version and date are written, the packages are built, and the wheel is
tested in a fresh virtual environment. Only then do the packages, a bill of materials and checksums
replace dist/, and the changed files are copied into this checkout. Nothing is committed, tagged,
pushed or uploaded: the last lines of the output are the commands that do that.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.version import InvalidVersion, Version
from wheel_environment import ROOT, WheelEnvironment

CHANGED = ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
_VERSION = re.compile(r'^version = "([^"]+)"', re.MULTILINE)  # of pyproject.toml, the only source
_UNRELEASED = re.compile(r"^## \[Unreleased\]\n(.*?)(?=^## \[|\Z)", re.MULTILINE | re.DOTALL)
_MODULE = (sys.executable, "-m")
_DEMO_EXTRAS = "train,ray,report"
# Enough to save a checkpoint, draw a picture and write a report.
_SHORT_DEMO = ("demo", "--out", "demo", "train.max_steps=20")


class ReleaseError(RuntimeError):
    """The release cannot be made; the message says what to do."""


def check(root: Path, version: str) -> None:
    """Check that a version may be released from a checkout.

    Args:
        root: Checkout.
        version: Version to release.

    Raises:
        ReleaseError: If the version is not new, or the checkout has changes.
    """
    try:
        wanted = Version(version)
    except InvalidVersion:
        raise ReleaseError(
            f"{version!r} is not a version. Give one: make release VERSION=0.2.0"
        ) from None
    if str(wanted) != version:
        raise ReleaseError(f"{version!r} is written {str(wanted)!r}. Give that as VERSION.")
    if changes := _git(root, "status", "--porcelain"):
        raise ReleaseError(f"The checkout has changes. Commit or remove them first:\n{changes}")
    if _git(root, "tag", "--list", f"v{version}"):
        raise ReleaseError(f"Tag v{version} exists. Give a newer VERSION.")
    if f"\n## [{version}]" in (root / "CHANGELOG.md").read_text():
        raise ReleaseError(f"CHANGELOG.md has {version} already. Give a newer VERSION.")
    if wanted <= (current := Version(_current_version(root))):
        raise ReleaseError(f"{version} is not newer than {current}. Give a newer VERSION.")
    unreleased = _UNRELEASED.search((root / "CHANGELOG.md").read_text())
    if unreleased is None or not unreleased[1].strip():
        raise ReleaseError('CHANGELOG.md has nothing under "## [Unreleased]". Write what changed.')


def write_version(root: Path, version: str, date: str) -> None:
    """Write version and date into the files that name them.

    Args:
        root: Folder of the files.
        version: New version.
        date: Date of its release, as 2026-11-23.
    """
    replacements = (
        ("pyproject.toml", _VERSION, f'version = "{version}"'),
        ("CITATION.cff", re.compile(r"^version: .*$", re.MULTILINE), f"version: {version}"),
        ("CITATION.cff", re.compile(r"^date-released: .*$", re.M), f"date-released: {date}"),
        (
            "CHANGELOG.md",
            re.compile(r"^## \[Unreleased\]$", re.MULTILINE),
            f"## [Unreleased]\n\n## [{version}] - {date}",
        ),
    )
    for name, pattern, replacement in replacements:
        text, number = pattern.subn(replacement, (root / name).read_text())
        if number != 1:
            raise ReleaseError(f"{name} has {number} lines like {pattern.pattern!r}, not one.")
        (root / name).write_text(text)


def write_checksums(folder: Path) -> None:
    """Write SHA256SUMS of all files of a folder, for `sha256sum --check`.

    Args:
        folder: Folder of the packages.
    """
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted(folder.iterdir())
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def make(root: Path, version: str, is_dry_run: bool) -> None:
    """Make the packages of a version in dist/.

    Args:
        root: Checkout.
        version: Version to release.
        is_dry_run: Whether to leave the files of the checkout as they are.
    """
    check(root, version)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    with tempfile.TemporaryDirectory(prefix="svfap-release-") as folder:
        source, packages = Path(folder, "source"), Path(folder, "dist")
        _copy_head(root, source)
        write_version(source, version, date)
        _run_tool(Path(sys.executable).with_name("hadolint"), *source.glob("launch/docker/*"))
        _say("Building the sdist, and the wheel from it")
        _run_tool(*_MODULE, "build", "--outdir", packages, source)
        (wheel,) = packages.glob("*.whl")
        _run_tool(*_MODULE, "twine", "check", "--strict", *packages.iterdir())
        environment = WheelEnvironment(Path(folder, "environment"))
        _try_base(environment, wheel, version)
        _try_demo(environment, wheel)
        bill = packages / f"svfap_dist-{version}.cdx.json"
        _write_bill_of_materials(environment, source, bill)
        write_checksums(packages)
        shutil.rmtree(root / "dist", ignore_errors=True)
        shutil.copytree(packages, root / "dist")
        if not is_dry_run:
            for name in CHANGED:
                shutil.copyfile(source / name, root / name)
    print("\n".join(str(path) for path in sorted((root / "dist").iterdir())))
    if is_dry_run:
        print(f"Dry run: {', '.join(CHANGED)} are unchanged.")
        return
    print(
        f"Next, after a look at `git diff`:\n"
        f"  git commit -m 'release: {version}' {' '.join(CHANGED)}\n"
        f"  git tag -a v{version} -m {version} && git push origin HEAD v{version}\n"
        f"  {Path(sys.executable).relative_to(root)} -m twine upload dist/*.whl dist/*.tar.gz"
    )


def _try_base(environment: WheelEnvironment, wheel: Path, version: str) -> None:
    """Test the wheel without extras: version, files, machine check, features, predictions."""
    _say("Testing the wheel without extras in a fresh environment")
    environment.install(wheel)
    if (shown := _svfap(environment, "--version")) != f"svfap {version}\n":
        raise ReleaseError(f"`svfap --version` prints {shown!r}, not svfap {version}.")
    _svfap(environment, "--help")
    _svfap(environment, "files", "-o", "files")
    if not (environment.work / "files/launch/recipes/tiny_cpu.toml").is_file():
        raise ReleaseError("`svfap files` copied no recipes out of the wheel.")
    found = json.loads(_svfap(environment, "doctor", "--json", codes=(0, 9)))["findings"]
    broken = [
        row["name"]
        for row in found
        if row["name"].startswith("version") and row["status"] == "fail"
    ]
    if broken:
        raise ReleaseError(f"`svfap doctor` fails on {', '.join(broken)}.")
    _svfap(environment, "extract", "exports/encoder", "videos", "-o", "features.npz")
    _svfap(environment, "predict", "exports/classifier", "videos")


def _try_demo(environment: WheelEnvironment, wheel: Path) -> None:
    """Test the wheel with the extras for training: pre-train a few steps."""
    _say(f"Testing the wheel with [{_DEMO_EXTRAS}]: a short `svfap demo`")
    environment.install(wheel, _DEMO_EXTRAS)
    _svfap(environment, *_SHORT_DEMO)
    for name in ("report.html", "pictures/reconstruction.png"):
        if not (environment.work / "demo/run" / name).is_file():
            raise ReleaseError(f"`svfap demo` ended without {name}.")


def _write_bill_of_materials(environment: WheelEnvironment, source: Path, path: Path) -> None:
    """List what is installed beside the wheel, in CycloneDX's format."""
    _say("Writing the bill of materials")
    of = ("--pyproject", source / "pyproject.toml", "--mc-type", "application")
    form = ("--output-format", "JSON", "--output-reproducible", "--output-file", path)
    _run_tool(*_MODULE, "cyclonedx_py", "environment", *of, *form, environment.python)


def _svfap(environment: WheelEnvironment, *words: str, codes: Sequence[int] = (0,)) -> str:
    done = environment.svfap(*words)
    if done.returncode not in codes:
        raise ReleaseError(
            f"`svfap {' '.join(words)}` exits with {done.returncode}:\n{done.stderr}"
        )
    return done.stdout


def _run_tool(*command: str | Path) -> None:
    """Run a tool of the release environment, with its output in the terminal."""
    if subprocess.run(command, check=False).returncode:
        raise ReleaseError(f"`{' '.join(map(str, command))}` failed; its output is above.")


def _copy_head(root: Path, target: Path) -> None:
    """Write the files of HEAD, and nothing else, to a new folder."""
    archive = subprocess.run(
        ["git", "-C", root, "archive", "HEAD"], check=True, capture_output=True
    ).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(target)  # no filter: Debian 12's Python has none


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _current_version(root: Path) -> str:
    match = _VERSION.search((root / "pyproject.toml").read_text())
    if match is None:
        raise ReleaseError("pyproject.toml has no version.")
    return match[1]


def _say(text: str) -> None:
    print(f"release: {text} ...", flush=True)


def main() -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("version", nargs="?", default="", help="version to release, as 0.2.0")
    parser.add_argument("--dry-run", action="store_true", help="change no file of the checkout")
    options = parser.parse_args()
    try:
        make(ROOT, options.version, options.dry_run)
    except RuntimeError as error:
        print(f"release: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
