"""Detect faces in a picture. To add a detector, write a class with `detect` and add its row.

`haar` needs only the package: OpenCV 4 includes the weights of its cascades (OpenCV 5 does not).
Where the frontal cascade finds nothing, the profile cascade is used, on the picture and on its
mirror image, with a higher threshold, since it has many false positives. `yunet:MODEL.onnx` is
OpenCV's small network, better with turned and covered faces; its file is at
https://github.com/opencv/opencv_zoo, face_detection_yunet.

OpenCV's threads are switched off: videos are spread over processes, and the order in which threads
collect the windows that agree on a face is not deterministic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from svfap_dist.errors import ConfigError

_SMALLEST_SHARE = 1 / 12  # of the picture's longest side: smaller faces give blurred crops
_SCALE_STEP = 1.1
_FRONTAL_AGREEMENT, _PROFILE_AGREEMENT = 4, 8  # windows that must agree on a face
_YUNET_SCORE, _YUNET_OVERLAP, _YUNET_CANDIDATES = 0.7, 0.3, 500


class Detections(NamedTuple):
    """Faces in one picture."""

    boxes: np.ndarray  # float64 [n, 4], x0, y0, x1, y1 in pixels
    scores: np.ndarray  # float64 [n], higher is more certain; comparable only within one detector


class Detector(Protocol):
    """Finds faces in pictures."""

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """Return the faces in a picture.

        Args:
            rgb: uint8 [height, width, 3].
        """
        ...


def load_detector(text: str) -> Detector:
    """Return a detector.

    Args:
        text: Its name in `DETECTORS`, with its argument: `haar`, or `yunet:MODEL.onnx`.

    Raises:
        ConfigError: There is none of that name, or OpenCV or a file is missing.
    """
    name, _, argument = text.partition(":")
    if name not in DETECTORS:
        known = ", ".join(DETECTORS)
        raise ConfigError("Unknown face detector", "--detector", text, f"use one of: {known}")
    return DETECTORS[name](argument)


class Haar:
    """OpenCV's cascades of boosted Haar features (Viola and Jones, 2001).

    Scores are the number of windows that agreed.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ConfigError(
                "Detector takes no file", "--detector", f"haar:{argument}", "use haar"
            )
        self._cv2 = _opencv()
        # Of the frontal cascades alt2 gave one box per face and the fewest others.
        self._frontal = self._cascade("haarcascade_frontalface_alt2.xml")
        self._profile = self._cascade("haarcascade_profileface.xml")

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """See `Detector.detect`."""
        gray = self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY)
        found = self._search(self._frontal, gray, _FRONTAL_AGREEMENT)
        if len(found.boxes):
            return found
        # The cascade knows one side of the face; the other is found in the mirror.
        one = self._search(self._profile, gray, _PROFILE_AGREEMENT)
        other = self._search(self._profile, self._cv2.flip(gray, 1), _PROFILE_AGREEMENT)
        other.boxes[:, [0, 2]] = gray.shape[1] - other.boxes[:, [2, 0]]
        return max((one, other), key=lambda side: side.scores.max(initial=0))

    def _search(self, cascade: Any, gray: np.ndarray, agreement: int) -> Detections:
        smallest = round(max(gray.shape) * _SMALLEST_SHARE)
        found, counts = cascade.detectMultiScale2(
            gray, scaleFactor=_SCALE_STEP, minNeighbors=agreement, minSize=(smallest, smallest)
        )
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> x0, y0, x1, y1
        return Detections(boxes, np.asarray(counts, np.float64).reshape(-1))

    def _cascade(self, name: str) -> Any:
        path = os.path.join(os.path.dirname(self._cv2.__file__), "data", name)
        if not os.path.exists(path):
            found, fix = f"OpenCV {self._cv2.__version__}", "pip install 'opencv-python-headless<5'"
            raise ConfigError("OpenCV has no Haar cascades", path, found, fix)
        return self._cv2.CascadeClassifier(path)


class YuNet:
    """OpenCV's YuNet from an ONNX file (Wu et al., Machine Intelligence Research 2023).

    Scores are the network's, 0 to 1.
    """

    def __init__(self, model: str) -> None:
        if not model or not os.path.isfile(model):
            fix = "give the path of its ONNX file: --detector yunet:/path/model.onnx"
            where = model or "--detector yunet"
            raise ConfigError("No model for detector yunet", where, "no such file", fix)
        cv2 = _opencv()
        try:
            self._network = cv2.FaceDetectorYN.create(
                model, "", (320, 320), _YUNET_SCORE, _YUNET_OVERLAP, _YUNET_CANDIDATES
            )
        except cv2.error as error:
            found, fix = str(error).strip(), "download the ONNX file of the detector again"
            raise ConfigError("Model cannot be read", model, found, fix) from error

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """See `Detector.detect`."""
        height, width = rgb.shape[:2]
        self._network.setInputSize((width, height))
        _, faces = self._network.detect(np.ascontiguousarray(rgb[:, :, ::-1]))
        # Of the 15 columns: x, y, width, height, five landmarks, score.
        rows = np.asarray(faces if faces is not None else [], np.float64).reshape(-1, 15)
        boxes = rows[:, :4].copy()
        boxes[:, 2:] += boxes[:, :2]
        return Detections(boxes, rows[:, 14])


DETECTORS: dict[str, Callable[[str], Detector]] = {"haar": Haar, "yunet": YuNet}


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        fix = "pip install 'svfap-dist[faces]'"
        raise ConfigError("Finding faces needs OpenCV", "--detector", str(error), fix) from error
    cv2.setNumThreads(0)
    return cv2
