"""Patches and targets straight from planes: the kernel against torch, and torch against itself."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interpreted_kernel import KernelCall, KernelResult, run_interpreted
from torch import Tensor

from svfap_dist.errors import ConfigError
from svfap_dist.model import autoencoder, patches, planes
from svfap_dist.parallel.processes import ChildProcess
from svfap_dist.profiling.traffic import kernel_bytes
from svfap_dist.video.frames import Colors, YuvClips, YuvFrames, convert_batch
from svfap_dist.video.info import Crop

KINDS = [Colors("bt601"), Colors("bt601", True), Colors("bt709"), Colors("bt709", True)]
SIZES = [(64, 64), (64, 64), (61, 47), (64, 80)]
# Of the clip's own size, enlarged, at borders, odd; see `SIZES` and `KINDS`.
CROPS = [(0, 0, 32, 32), (5, 7, 21, 24), (13, 0, 48, 47), (11, 17, 53, 63)]


@dataclasses.dataclass(frozen=True)
class Case:
    """Noise in planes, and tokens drawn from it."""

    sizes: list[tuple[int, int]]
    crops: list[tuple[int, int, int, int]]
    size: int
    patch: tuple[int, int]
    frames: int
    tokens: tuple[int, int]  # visible, masked
    dtype: str = "float32"

    def call(self) -> KernelCall:
        rng = np.random.default_rng(0)

        def noise(height: int, width: int) -> np.ndarray:
            return rng.integers(0, 256, (self.frames, height, width), dtype=np.uint8)

        clips = [
            YuvFrames(noise(h, w), *(noise((h + 1) // 2, (w + 1) // 2) for _ in "uv"), colors)
            for (h, w), colors in zip(self.sizes, KINDS, strict=False)
        ]
        batch = YuvClips.stack(clips, [Crop(*crop) for crop in self.crops], self.size)
        tensors = {name: getattr(batch, name).numpy() for name in ("y", "u", "v", "crops", "kinds")}
        total = self.frames // self.patch[0] * (self.size // self.patch[1]) ** 2
        drawn = np.stack([rng.permutation(total) for _ in clips])
        drawn[0, :2] = drawn[0, [*np.flatnonzero(drawn[0] == total - 1), 1]]  # the last corner
        visible, masked = np.split(drawn[:, : sum(self.tokens)], [self.tokens[0]], axis=1)
        return KernelCall(tensors, self.size, visible, masked, self.patch, self.dtype)


CASES = {
    "several": Case(SIZES, CROPS, 32, (2, 16), 4, (1, 2)),
    "small_patches": Case(SIZES, CROPS, 32, (1, 8), 2, (1, 2)),
    "made_much_smaller": Case([(121, 170)], [(7, 5, 114, 165)], 32, (2, 16), 2, (1, 2)),
    "no_powers_of_two": Case([(33, 31)], [(0, 0, 33, 31)], 28, (3, 14), 6, (2, 4)),
    "paper": Case(
        [(160, 160)] * 2, [(0, 0, 160, 160), (27, 55, 105, 105)], 160, (2, 16), 16, (2, 3)
    ),
    "bfloat16": Case(SIZES, CROPS, 32, (2, 16), 2, (1, 1), "bfloat16"),
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ChildProcess[KernelCall, KernelResult]]:
    with ChildProcess(run_interpreted, seconds=200) as process:
        yield process


def oracle(call: KernelCall) -> tuple[Tensor, Tensor]:
    """The same by whole pictures in float32, with the products of `convert_batch`."""
    rgb = convert_batch(call.clips, torch.float32)
    visible, masked = torch.from_numpy(call.visible), torch.from_numpy(call.masked)
    return (
        patches.visible_patches(rgb, visible, call.patch),
        patches.targets(rgb, masked, call.patch),
    )


def check(call: KernelCall, seen: Tensor, targets: Tensor, rounding: float) -> None:
    """Compare with the oracle.

    Both add the same numbers in float32, in another order, and round to whole levels. So a pixel
    next to a tie may differ by a level, and nothing else may. Such a pixel moves the mean and
    deviation of its patch a little, and with them all targets of the patch. `rounding` is what
    bfloat16 adds, relative.
    """
    expected_seen, expected_targets = oracle(call)
    rounding = 0.0 if call.dtype == "float32" else rounding
    assert seen.shape == expected_seen.shape
    assert targets.shape == expected_targets.shape
    levels = (seen - expected_seen).abs() - rounding * expected_seen.abs()
    levels *= 255 * torch.tensor(patches.IMAGENET_STD).repeat_interleave(seen.shape[2] // 3)
    assert levels.max() < 1.001
    assert (levels > 0.001).float().mean() < 1e-3
    difference = (targets - expected_targets).abs() - rounding * expected_targets.abs()
    assert difference.max() < 0.05  # a level in noise
    assert (difference > 1e-3).float().mean() < 1e-3


@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_equals_whole_pictures(
    name: str, interpreter: ChildProcess[KernelCall, KernelResult]
) -> None:
    call = CASES[name].call()
    result = interpreter(call)
    check(
        call, torch.from_numpy(result.seen), torch.from_numpy(result.targets), 2**-7
    )  # the interpreter truncates
    visible, masked = torch.from_numpy(call.visible), torch.from_numpy(call.masked)
    dtype = getattr(torch, call.dtype)
    counted = kernel_bytes(call.clips, visible, masked, call.patch, dtype)
    assert result.bytes_touched == pytest.approx(counted, rel=0.001)


def test_no_crop_makes_the_kernel_read_outside_the_frame(
    interpreter: ChildProcess[KernelCall, KernelResult],
) -> None:
    case = Case([(40, 50)] * 2, [(0, 0, 0, 0), (40, 50, 30, 30)], 32, (2, 16), 2, (1, 1))
    call = case.call()
    result = interpreter(call)
    corners = torch.tensor([[0, 0, 1, 1], [39, 49, 1, 1]])
    rgb = convert_batch(dataclasses.replace(call.clips, crops=corners), torch.float32)
    masked = torch.from_numpy(call.masked)
    assert np.allclose(result.targets, patches.targets(rgb, masked, call.patch), atol=1e-5)


class _H100:
    """The part of Triton's driver that compiling needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_compiles_for_an_h100_without_spilling(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    from svfap_dist.model import plane_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", _H100())
    kernel: Any = plane_kernel._token_kernel
    compiled: list[str] = []

    class Launcher:
        def __getitem__(self, grid: object) -> Any:
            def compile(*arguments: object, **options: object) -> None:
                compiled.append(kernel.warmup(*arguments, grid=grid, **options).asm["ptx"])

            return compile

    monkeypatch.setattr(plane_kernel, "_token_kernel", Launcher())
    call = CASES[name].call()
    visible, masked = torch.from_numpy(call.visible), torch.from_numpy(call.masked)
    dtype = getattr(torch, call.dtype)
    plane_kernel.patches_and_targets(call.clips, visible.int(), masked.int(), call.patch, dtype)
    (tmp_path / "kernel.ptx").write_text(compiled[0])
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "0 bytes spill stores" in done.stderr
    (registers,) = re.findall(r"Used (\d+) registers", done.stderr)
    assert int(registers) <= 96  # of 65,536 for at least 5 programs of 128 threads


@pytest.mark.gpu
@pytest.mark.parametrize("index_type", [torch.int32, torch.int64])
@pytest.mark.parametrize("name", list(CASES))
def test_the_kernel_on_a_gpu_equals_whole_pictures(name: str, index_type: torch.dtype) -> None:
    call = CASES[name].call()
    clips = call.clips.to("cuda")
    visible, masked = (
        torch.from_numpy(tokens).to("cuda", index_type) for tokens in (call.visible, call.masked)
    )
    dtype = getattr(torch, call.dtype)
    found = planes.patches_and_targets(clips, visible, masked, call.patch, dtype)
    assert [tensor.dtype for tensor in found] == [dtype, dtype]
    check(call, *(tensor.cpu().float() for tensor in found), 2**-8)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = planes.patches_and_targets(clips, visible, masked, call.patch, dtype)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for first, second in zip(found, again, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("missing", ["triton", "compiler", ""])
def test_what_the_kernel_lacks_is_named_once(
    missing: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    module, compiler = missing != "triton", missing != "compiler"
    monkeypatch.setattr(planes.importlib.util, "find_spec", lambda name: module or None)
    monkeypatch.setattr(planes.shutil, "which", lambda name: name if compiler else None)
    planes._has_triton.cache_clear()
    assert [planes._has_triton() for _ in range(2)] == [not missing] * 2
    planes._has_triton.cache_clear()
    assert len(caplog.messages) == bool(missing)
    assert missing in caplog.text.lower()


def test_on_a_cpu_planes_give_the_bits_of_their_pictures() -> None:
    call = CASES["several"].call()
    visible, masked = torch.from_numpy(call.visible), torch.from_numpy(call.masked)
    rgb = call.clips.to_rgb("cpu")
    for frames in (call.clips, rgb):
        seen, targets = planes.patches_and_targets(
            frames, visible, masked, call.patch, torch.float32
        )
        assert torch.equal(seen, patches.visible_patches(rgb, visible, call.patch))
        assert torch.equal(targets, patches.targets(rgb, masked, call.patch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_gives_the_same_bits_for_patches_as_for_frames(
    dtype: torch.dtype, tubes: Callable[..., tuple[Tensor, Tensor]]
) -> None:
    torch.manual_seed(0)
    model = autoencoder.build("nano", num_frames=8, frame_size=64).to(dtype)
    frames = torch.randint(0, 256, (2, 8, 64, 64, 3), dtype=torch.uint8)
    visible, masked = tubes(model.size, 2, 3)
    seen, _ = planes.patches_and_targets(frames, visible, masked, model.size.patch, dtype)
    assert torch.equal(model(seen, visible, masked), model(frames, visible, masked))
    with pytest.raises(ConfigError, match=r"patches of shape \(2, 11, 1536\)"):
        model(seen[:, :-1], visible, masked)
