"""A picture -> boxes around faces. Detectors are exchangeable: a class with `detect`, and a row.

`haar` needs nothing but the package: OpenCV 4 carries the weights of its cascades (OpenCV 5 does
not). The frontal cascade decides; only where it finds nothing is the profile cascade asked, on the
picture and on its mirror image, and believed only with more agreement, since it sees faces in many
things. `yunet:MODEL.onnx` is OpenCV's small network, better with turned and covered faces, for
those who have its file (https://github.com/opencv/opencv_zoo, face_detection_yunet).

OpenCV's threads are switched off: videos are spread over processes, and threads would gather the
windows that agree on a face in another order each time.
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
    """Faces in one picture.

    boxes: float64 [n, 4], x0, y0, x1, y1 in pixels.
    scores: float64 [n], higher is surer; comparable only within one detector.
    """

    boxes: np.ndarray
    scores: np.ndarray


class Detector(Protocol):
    """What finds faces."""

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """Faces in a picture, uint8 [height, width, 3]."""
        ...


def load(text: str) -> Detector:
    """The detector that the command line names: `haar`, or `yunet:MODEL.onnx`.

    Raises: ConfigError if there is none of that name, or OpenCV or its files are missing.
    """
    name, _, argument = text.partition(":")
    if name not in DETECTORS:
        known = ", ".join(DETECTORS)
        raise ConfigError("Unknown face detector", found=text, do=f"use one of: {known}")
    return DETECTORS[name](argument)


class Haar:
    """The cascades of boosted Haar features that OpenCV carries (Viola and Jones, 2001).

    Scores are the number of windows that agreed.
    """

    def __init__(self, argument: str = "") -> None:
        if argument:
            raise ConfigError("Detector takes no file", found=f"haar:{argument}", do="use haar")
        self._cv2 = _opencv()
        # Of the frontal cascades alt2 gave one box per face and the fewest others.
        self._frontal = self._cascade("haarcascade_frontalface_alt2.xml")
        self._profile = self._cascade("haarcascade_profileface.xml")

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """Faces in a picture, uint8 [height, width, 3]."""
        grey = self._cv2.cvtColor(rgb, self._cv2.COLOR_RGB2GRAY)
        found = self._search(self._frontal, grey, _FRONTAL_AGREEMENT)
        if len(found.boxes):
            return found
        # The cascade knows one side of the face; the other is found in the mirror.
        one = self._search(self._profile, grey, _PROFILE_AGREEMENT)
        other = self._search(self._profile, self._cv2.flip(grey, 1), _PROFILE_AGREEMENT)
        other.boxes[:, [0, 2]] = grey.shape[1] - other.boxes[:, [2, 0]]
        return max((one, other), key=lambda side: side.scores.max(initial=0))

    def _search(self, cascade: Any, grey: np.ndarray, agreement: int) -> Detections:
        smallest = round(max(grey.shape) * _SMALLEST_SHARE)
        found, counts = cascade.detectMultiScale2(
            grey, scaleFactor=_SCALE_STEP, minNeighbors=agreement, minSize=(smallest, smallest)
        )
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # x, y, width, height -> x0, y0, x1, y1
        return Detections(boxes, np.asarray(counts, np.float64).reshape(-1))

    def _cascade(self, name: str) -> Any:
        path = os.path.join(os.path.dirname(self._cv2.__file__), "data", name)
        if not os.path.exists(path):
            raise ConfigError(
                "OpenCV has no Haar cascades",
                where=path,
                found=f"OpenCV {self._cv2.__version__}",
                do="pip install 'opencv-python-headless<5'",
            )
        return self._cv2.CascadeClassifier(path)


class YuNet:
    """OpenCV's YuNet from an ONNX file (Wu et al., Machine Intelligence Research 2023).

    Scores are the network's, 0 to 1.
    """

    def __init__(self, model: str) -> None:
        if not model or not os.path.isfile(model):
            raise ConfigError(
                "No model for detector yunet",
                where=model or "--detector yunet",
                do="give the path of its ONNX file: --detector yunet:/path/model.onnx",
            )
        cv2 = _opencv()
        try:
            self._network = cv2.FaceDetectorYN.create(
                model, "", (320, 320), _YUNET_SCORE, _YUNET_OVERLAP, _YUNET_CANDIDATES
            )
        except cv2.error as error:
            advice = "give YuNet's ONNX file, whole"
            raise ConfigError(
                "Model cannot be read", where=model, found=str(error).strip(), do=advice
            ) from error

    def detect(self, rgb: np.ndarray, /) -> Detections:
        """Faces in a picture, uint8 [height, width, 3]."""
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
        raise ConfigError(
            "Finding faces needs OpenCV", found=str(error), do="pip install 'svfap-dist[faces]'"
        ) from error
    cv2.setNumThreads(0)
    return cv2
