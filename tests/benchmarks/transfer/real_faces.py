"""Turn clones of public repositories with real faces into inputs of `svfap shard`.

    python tests/benchmarks/transfer/real_faces.py ck48 CLONE OUTPUT

reads a clone and writes copies of its images, and for labeled sets `list.csv`, below OUTPUT, a new
folder. docs/transfer.md has the repositories, their licenses and the commands that follow.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

_FACE = 0.68  # of a photo's side, around its middle, that muxspace's faces fill
_SIDE = 64  # pixels of what is written of a photo
_FEWEST = 20  # persons of a class, with fewer of which it is left out


def ck48(clone: Path, output: Path) -> str:
    """Write the last three frames of each sequence of CK+ as a folder of frames, and a list.

    Args:
        clone: of WuJie1010/Facial-Expression-Recognition.Pytorch.
        output: new folder.

    Returns:
        What was written.
    """
    sequences: dict[tuple[str, str, str], list[Path]] = {}
    for image in sorted(clone.glob("CK+48/*/S*_*_*.png")):
        person, sequence, _ = image.stem.split("_")
        sequences.setdefault((image.parent.name, person, sequence), []).append(image)
    rows = []
    for (label, person, sequence), images in sequences.items():
        folder = f"{person}_{sequence}"
        for image in images:
            _copy(image, output / folder / image.name)
        rows.append((folder, label, person))
    return _write_list(output, rows)


def muxspace(clone: Path, output: Path) -> str:
    """Write the face of each labeled photo as a clip of one frame, and a list.

    Photos without a name, with two different labels, or of a class that few persons show are left
    out.

    Args:
        clone: of muxspace/facial_expressions.
        output: new folder.

    Returns:
        What was written.
    """
    with (clone / "data" / "legend.csv").open(newline="") as file:
        labels: dict[str, set[str]] = {}
        for row in csv.DictReader(file):
            labels.setdefault(row["image"], set()).add(row["emotion"].lower())
    found = []
    for name, given in sorted(labels.items()):
        person = re.fullmatch(r"(.+?)_\d+\.jpg", name)
        if len(given) == 1 and person and (clone / "images" / name).is_file():
            found.append((name, *given, person[1]))
    persons = Counter(label for label, _ in {(label, person) for _, label, person in found})
    rows = []
    for name, label, person in found:
        if persons[label] >= _FEWEST:
            folder = name.removesuffix(".jpg")
            _cut(clone / "images" / name, output / folder / name)
            rows.append((folder, label, person))
    return _write_list(output, rows)


def fer2013(clone: Path, output: Path) -> str:
    """Write every second of the images that differ, of all splits, without labels.

    Args:
        clone: of RecepTahirGunlu/Duygu-Tanima.
        output: new folder.

    Returns:
        What was written.
    """
    different: dict[bytes, Path] = {}
    for split in ("test", "train", "validation"):
        for image in sorted(clone.glob(f"{split}/*/*.jpg")):
            different.setdefault(hashlib.sha256(image.read_bytes()).digest(), image)
    images = list(different.values())[::2]
    for number, image in enumerate(images):
        _copy(image, output / f"{2 * number:06d}.jpg")
    return f"{len(images)} images"


SETS: dict[str, Callable[[Path, Path], str]] = {
    "ck48": ck48,
    "fer2013": fer2013,
    "muxspace": muxspace,
}


def _copy(image: Path, path: Path) -> None:
    """Copy a file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(image, path)


def _cut(photo: Path, path: Path) -> None:
    """Write the middle of a photo, where the face is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(photo) as image:
        margin_x, margin_y = (round(side * (1 - _FACE) / 2) for side in image.size)
        box = (margin_x, margin_y, image.width - margin_x, image.height - margin_y)
        face = image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box)
    face.save(path, quality=95)


def _write_list(output: Path, rows: list[tuple[str, str, str]]) -> str:
    """Write the list that `svfap shard csv` reads."""
    with (output / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "subject"), *rows])
    classes = Counter(label for _, label, _ in rows)
    persons = len({person for *_, person in rows})
    return f"{len(rows)} clips of {persons} persons: {dict(sorted(classes.items()))}"


def main() -> None:
    """Read the arguments and write one set."""
    parser = argparse.ArgumentParser(description="Turn a clone into inputs of svfap shard.")
    parser.add_argument("set", choices=SETS)
    parser.add_argument("clone", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.output.exists():
        sys.exit(f"{arguments.output} is there: give a new folder")
    arguments.output.mkdir(parents=True)
    print(SETS[arguments.set](arguments.clone, arguments.output))


if __name__ == "__main__":
    main()
