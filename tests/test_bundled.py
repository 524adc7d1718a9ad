"""`svfap files`: what the wheel carries for operators, copied out."""

from __future__ import annotations

from svfap_dist import bundled


def test_files_are_copied_whole_and_changed_ones_left_alone(tmp_path):
    written = bundled.copy(tmp_path, ["launch"])
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert {"launch/recipes/tiny_cpu.toml", "launch/slurm/pretrain.sbatch"} <= names
    source = bundled.folder("launch") / "slurm" / "pretrain.sbatch"
    copied = tmp_path / "launch" / "slurm" / "pretrain.sbatch"
    assert copied.read_bytes() == source.read_bytes()
    assert not (tmp_path / "monitoring").exists()

    copied.write_text("mine")
    (tmp_path / "launch" / "README.md").unlink()
    assert bundled.copy(tmp_path, ["launch"]) == [tmp_path / "launch" / "README.md"]
    assert copied.read_text() == "mine"


def test_launch_and_monitoring_hold_no_python():
    for name in bundled.FOLDERS:
        assert not list(bundled.folder(name).rglob("*.py"))
