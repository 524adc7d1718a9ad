"""Run a network on one video: prediction, prediction over time, and pictures.

In: bytes of a video. Out: an `Analysis`, whose fields are those of the JSON endpoint, or
`UnusableError` with advice. Decoding is the work of a child process that is killed when it exceeds
its time or memory; the network sees only the clips that it returns.
"""

from __future__ import annotations

import base64
import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svfap_dist import storage
from svfap_dist.checkpoint import load as checkpoints
from svfap_dist.config import MaskConfig
from svfap_dist.errors import ConfigError, DecodeError, HealthError
from svfap_dist.evaluate import reconstruction
from svfap_dist.evaluate.runner import to_scores
from svfap_dist.inference.load import move, network_of, open_model
from svfap_dist.model import patches, weights
from svfap_dist.model.autoencoder import MaskedAutoencoder
from svfap_dist.model.sizes import Size
from svfap_dist.parallel.processes import ChildProcess, CrashedError, HungError
from svfap_dist.report import token_maps
from svfap_dist.rng import Stream
from svfap_dist.serving.prepare import Prepared, Preparer, ViewedClips
from svfap_dist.storage.hub import local_folder
from svfap_dist.video import image_grid
from svfap_dist.video.probe import Limits, Rejected

_BATCH_SIZE = 8  # clips of a forward pass
_CONVERT = "convert it, for example to an MP4 with H.264 of at most 1920x1080 pixels"
_SHORTER = "cut it to at most {duration} s"
_WHOLE = "give a complete video file: MP4, WebM, MKV, MOV or AVI"
_ADVICE = {
    "no_face": "use a video in which one face is large, lit and turned to the camera",
    "too_long": _SHORTER,
    "too_large": "make its frames smaller: at most {pixels} pixels",
    "too_big": "make the file smaller: at most {megabytes} MiB",
    "hung": f"{_SHORTER}, or {_CONVERT}",
    "crashed": _CONVERT,
    "out_of_memory": _CONVERT,
    "odd_rate": _CONVERT,
    "undecodable": _CONVERT,
}


class UnusableError(DecodeError):
    """A video from which no clips can be cut."""


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What is known about a video.

    Args:
        video: num_frames, fps, width, height.
        face: first_frame, num_frames, seen, squares; None without a detector.
        prediction: label (None for a regression) and scores by name; None without a head.
        timeline: seconds, the middle of each clip; scores, by name a list; or features, a list for
            each clip.
        pictures: PNG files in base64: face, reconstruction, tokens; those that there are.
        crop: MP4 in base64.
        notes: What is missing, and why.
    """

    video: dict[str, Any]
    face: dict[str, Any] | None
    prediction: dict[str, Any] | None
    timeline: dict[str, Any]
    pictures: dict[str, str]
    crop: str
    notes: list[str]
    seconds: float  # that it took


class Analyzer:
    """A network, and the process that prepares videos for it; for one caller at a time.

    Args:
        url: As `inference.load.load`.
        overrides: As `inference.load.load`.
        device: As `inference.load.move`.
        detector: As `prepare.Preparer`.
        limits: What a video may cost.

    Raises:
        CheckpointError: There is no network.
        ConfigError: An override does not fit, or the device is not available.
        StorageError: The store fails.
    """

    def __init__(
        self, url: str, overrides: Mapping[str, Any], device: str, detector: str, limits: Limits
    ) -> None:
        self.info, model = open_model(url, overrides)
        self.limits = limits
        self._network = move(network_of(self.info, model), device)
        self._model = model.to(self._network.device)
        self._mask = _mask_of(url, model.size)
        self._child: ChildProcess[bytes, Prepared | Rejected] = ChildProcess(
            Preparer(self.info, detector, limits),
            seconds=limits.seconds,
            memory_bytes=limits.memory_bytes,
            ignore_interrupts=True,
            one_thread=True,
        )

    def __call__(self, data: bytes) -> Analysis:
        """Return what the network makes of a video.

        Args:
            data: Bytes of the file.

        Raises:
            UnusableError: It cannot be used.
            HealthError: The network's outputs are not finite.
        """
        began = time.monotonic()
        prepared = self._prepare(data)
        timeline, pictures, notes = self._over_time(prepared), {}, []
        if prepared.face is not None:
            pictures["face"] = _base64(prepared.face.picture)
        middle = self._middle_clip(prepared.timeline)
        if isinstance(self._model, MaskedAutoencoder):
            pictures["reconstruction"] = _base64(self._reconstruction(middle))
            notes.append("No prediction: this network is only pre-trained and has no head.")
        else:
            notes.append("No reconstruction: a fine-tuned network has no pixel decoder.")
        try:
            pictures["tokens"] = _base64(self._tokens(middle))
        except ConfigError:  # its encoder has none
            notes.append("No token map: this encoder has none.")
        return Analysis(
            video=_fields(prepared.info, "num_frames", "fps", "width", "height"),
            face=_face(prepared),
            prediction=self._prediction(prepared.test),
            timeline=timeline,
            pictures=pictures,
            crop=_base64(prepared.crop) if prepared.face is not None else "",
            notes=notes,
            seconds=round(time.monotonic() - began, 3),
        )

    def close(self) -> None:
        """End the process for good, from any thread; a call under way raises UnusableError."""
        self._child.kill()

    def _prepare(self, data: bytes) -> Prepared:
        try:
            prepared = self._child(data)
        except HungError:
            prepared = Rejected("hung", f"not decoded within {self.limits.seconds} s")
        except CrashedError as error:
            prepared = Rejected("crashed", f"the decoder died: {error}")
        if isinstance(prepared, Rejected):
            raise self.unusable(prepared)
        return prepared

    def unusable(self, why: Rejected) -> UnusableError:
        """Return the error for a video.

        Args:
            why: The reason.
        """
        advice = _ADVICE.get(why.reason, _WHOLE).format(
            duration=self.limits.duration,
            pixels=self.limits.pixels,
            megabytes=self.limits.file_bytes >> 20,
        )
        found = f"{why.reason.replace('_', ' ')}: {why.detail}"
        error = UnusableError("Video cannot be used", "the video that was sent", found, advice)
        error.reason = why.reason
        return error

    @torch.inference_mode()
    def _outputs(self, clips: np.ndarray, batch_size: int) -> np.ndarray:
        """Return scores [V, K], or features [V, D] without a head."""
        network, info = self._network, self.info
        found = []
        for batch in torch.from_numpy(clips).split(batch_size):
            outputs = network.outputs(batch.to(network.device))
            if network.head is not None:
                outputs = to_scores(outputs, info.kind, info.activation)
            found.append(outputs.float().cpu())
        scores = torch.cat(found).numpy()
        if not np.isfinite(scores).all():
            found_, do = "NaN or infinite values", "serve an earlier checkpoint"
            what = "Outputs of the network are not finite"
            raise HealthError(what, "the network that is served", found_, do)
        return scores

    def _over_time(self, prepared: Prepared) -> dict[str, Any]:
        info, fps = self.info, prepared.info.fps
        first = prepared.face.first_frame if prepared.face else 0
        seconds = [
            round((first + start + info.window / 2) / fps, 3) for start in prepared.timeline.starts
        ]
        rows = self._outputs(prepared.timeline.clips, _BATCH_SIZE)
        if self._network.head is None:
            return {"seconds": seconds, "scores": None, "features": _digits(rows)}
        scores = {info.name_of(k): _digits(column) for k, column in enumerate(rows.T)}
        return {"seconds": seconds, "scores": scores, "features": None}

    def _prediction(self, test: ViewedClips) -> dict[str, Any] | None:
        """Return what `svfap predict` gives for the crop."""
        info = self.info
        if self._network.head is None:
            return None
        scores = test.weights @ self._outputs(test.clips, len(test.clips))
        label = info.name_of(int(scores.argmax())) if info.kind == "classification" else None
        by_name = {info.name_of(k): score for k, score in enumerate(_digits(scores))}
        return {"label": label, "scores": by_name}

    def _middle_clip(self, timeline: ViewedClips) -> Tensor:
        """Return the clip that pictures show, uint8 [1, F, S, S, 3]."""
        clip = torch.from_numpy(timeline.clips[len(timeline.clips) // 2]).unsqueeze(0)
        return clip.to(self._network.device)

    def _reconstruction(self, frames: Tensor) -> bytes:
        model, stream = self._model, Stream(0, "picture")
        assert isinstance(model, MaskedAutoencoder)
        rows = reconstruction.reconstruct(model, model.size, frames, self._mask, stream)
        grid = image_grid.draw_grid(reconstruction.grid_rows(rows, "clip in the middle"))
        return image_grid.png_of(grid)

    @torch.inference_mode()
    def _tokens(self, frames: Tensor) -> bytes:
        clip = patches.normalize(frames)
        maps = token_maps.rows(self._network.encoder, self._model.size.encoder, clip)
        shown = token_maps.grid_rows(frames[0].cpu().numpy(), maps, "clip in the middle")
        return image_grid.png_of(image_grid.draw_grid(shown))


def _mask_of(url: str, size: Size) -> MaskConfig:
    """Return the mask of pre-training: the run's; of an export, which stores none, the paper's."""
    if not storage.exists(storage.join(local_folder(url), weights.BUILD)):
        return checkpoints.locate_weights(url)[1].mask
    if size.num_visible_tubelets is None:
        return MaskConfig()
    return MaskConfig(kind="frame", ratio=1 - size.num_visible_tubelets / size.num_tubelets)


def _face(prepared: Prepared) -> dict[str, Any] | None:
    if (face := prepared.face) is None:
        return None
    fields = _fields(face, "first_frame", "seen", "squares")
    return {**fields, "num_frames": len(face.squares)}


def _fields(record: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(record, name) for name in names}


def _digits(values: np.ndarray) -> Any:
    """Return float32 values as lists of their shortest digits."""
    if values.ndim > 1:
        return [_digits(row) for row in values]
    return [float(str(value)) for value in values.astype(np.float32)]


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
