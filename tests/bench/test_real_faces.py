"""tests/benchmarks/transfer: what is written of clones with real faces, and its two recipes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from benchmarks.transfer import real_faces
from PIL import Image

from svfap_dist.config import recipe

RECIPES = Path(real_faces.__file__).parent


def write(path: Path, value: int, side: int = 48) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (side, side), value).save(path)


def rows_of(output: Path) -> list[tuple[str, ...]]:
    with (output / "list.csv").open(newline="") as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_a_sequence_of_ck_is_a_folder_of_frames_with_its_person(tmp_path: Path) -> None:
    for frame in (17, 18, 19):
        write(tmp_path / "clone" / "CK+48" / "anger" / f"S010_004_000000{frame}.png", frame)
    write(tmp_path / "clone" / "CK+48" / "fear" / "S010_002_00000014.png", 14)
    real_faces.ck48(tmp_path / "clone", tmp_path / "out")
    assert rows_of(tmp_path / "out") == [
        ("S010_004", "anger", "S010"),
        ("S010_002", "fear", "S010"),
    ]
    assert len(list((tmp_path / "out" / "S010_004").iterdir())) == 3


def test_photos_without_one_label_or_one_name_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_faces, "_FEWEST", 2)
    legend = ["user.id,image,emotion"]
    for name, label in (
        ("A_B_0001.jpg", "happiness"),
        ("C_0001.jpg", "HAPPINESS"),
        ("C_0002.jpg", "fear"),  # of one person only
        ("D_0001.jpg", "happiness"),
        ("D_0001.jpg", "anger"),
        ("unnamed.jpg", "happiness"),
        ("missing_0001.jpg", "happiness"),
    ):
        legend.append(f"1,{name},{label}")
        if name != "missing_0001.jpg":
            write(tmp_path / "clone" / "images" / name, 9, side=350)
    (tmp_path / "clone" / "data").mkdir()
    (tmp_path / "clone" / "data" / "legend.csv").write_text("\n".join(legend))
    real_faces.muxspace(tmp_path / "clone", tmp_path / "out")
    expected = [("A_B_0001", "happiness", "A_B"), ("C_0001", "happiness", "C")]
    assert rows_of(tmp_path / "out") == expected
    with Image.open(tmp_path / "out" / "C_0001" / "C_0001.jpg") as face:
        assert face.size == (64, 64)


def test_of_different_images_every_second_is_taken(tmp_path: Path) -> None:
    for number, value in enumerate((1, 1, 2, 3)):
        write(tmp_path / "clone" / "train" / "happy" / f"{number}.jpg", value)
    real_faces.fer2013(tmp_path / "clone", tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [
        "000000.jpg",
        "000002.jpg",
    ]


@pytest.mark.parametrize("name", ["pretrain_faces48", "finetune_faces48"])
def test_recipe_loads(name: str) -> None:
    config = recipe.load(str(RECIPES / f"{name}.toml"), ["data.url=shards", "run.url=run"])
    assert config.data.frame_size == 48
